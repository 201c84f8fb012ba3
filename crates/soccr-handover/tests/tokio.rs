//! Connections of tokio's streams move, and nothing that waits is done on the threads of its executor.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use soccr_handover::{ErrorKind, Limits, Mover, Outcome, Terms};
use soccr_image::stream::{Decoded, Decoder, Message, Writer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufStream, DuplexStream, duplex};
use tokio::net::TcpStream;

soccr_lab::tests![
    what_half_a_request_was_read_of_moves_along,
    a_future_that_is_dropped_leaves_the_connection_here,
    a_future_that_is_never_polled_leaves_the_connection_here,
    a_panic_in_the_terms_is_told,
    what_is_refused_serves_on,
    the_executor_goes_on_meanwhile,
    through_a_buffer_the_last_words_of_a_source_arrive,
    through_a_buffer_the_last_words_of_a_target_arrive,
    who_stops_listening_has_told_the_source,
];

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work)
}

async fn connect() -> (TcpStream, std::net::TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
    let peer = std::net::TcpStream::connect("127.0.0.1:8080").unwrap();
    peer.set_read_timeout(Some(soccr_lab::LIMIT)).unwrap();
    let stream = listener.accept().unwrap().0;
    stream.set_nonblocking(true).unwrap();
    (TcpStream::from_std(stream).unwrap(), peer)
}

async fn assert_alive(stream: &mut TcpStream, mut peer: &std::net::TcpStream) {
    let mut read = [0; 5];
    peer.write_all(b"hello").unwrap();
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"hello");
    stream.write_all(b"world").await.unwrap();
    peer.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"world");
}

fn what_half_a_request_was_read_of_moves_along() {
    run(async {
        let (mut stream, mut peer) = connect().await;
        peer.write_all(b"GET / HT").unwrap();
        let mut read = Vec::new();
        stream.read_buf(&mut read).await.unwrap();
        peer.write_all(b"TP/1.1").unwrap();
        let (mut here, there) = duplex(4096);
        let mut arrivals = Mover::new().unwrap().listen_async(there);
        let departing = Mover::new().unwrap().take(stream).unwrap().unread(&read).unwrap();
        assert!(departing.with_state(*b"keep-alive").send(&mut here).await.is_moved());
        drop(here);
        let arrived = arrivals.next().await.unwrap().unwrap();
        assert_eq!(arrived.state(), b"keep-alive");
        let mut stream = arrived.into_stream().unwrap();
        let mut request = [0; 14];
        stream.read_exact(&mut request).await.unwrap();
        assert_eq!(&request, b"GET / HTTP/1.1");
        assert_alive(&mut stream, &peer).await;
        assert!(arrivals.next().await.unwrap().is_none());
    });
}

fn a_future_that_is_dropped_leaves_the_connection_here() {
    run(async {
        let (stream, peer) = connect().await;
        let mover = Mover::new().unwrap();
        let (mut here, mut there) = duplex(1 << 20);
        // A target that says no more than that it is there: the connection is locked, saved and sent.
        let hello = soccr_image::stream::Writer::new(Vec::new()).unwrap().get_mut().clone();
        there.write_all(&hello).await.unwrap();
        let mut sent = vec![0; 300];
        tokio::select! {
            outcome = mover.take(stream).unwrap().send(&mut here) => panic!("{outcome:?}"),
            read = there.read_exact(&mut sent) => assert_eq!(read.unwrap(), 300),
        }
        // What a thread was doing when the future was dropped is brought to its end there.
        let came_back = loop {
            match mover.came_back().pop() {
                Some(came_back) => break came_back,
                None => tokio::task::yield_now().await,
            }
        };
        assert_eq!(came_back.error.kind(), ErrorKind::Gone);
        let mut stream = TcpStream::from_std(came_back.value).unwrap();
        assert_alive(&mut stream, &peer).await;
    });
}

fn a_future_that_is_never_polled_leaves_the_connection_here() {
    run(async {
        let (stream, peer) = connect().await;
        let mover = Mover::new().unwrap();
        let (mut here, _there) = duplex(4096);
        drop(mover.take(stream).unwrap().send(&mut here));
        let mut came_back = mover.came_back();
        let mut stream = TcpStream::from_std(came_back.pop().unwrap().value).unwrap();
        assert_alive(&mut stream, &peer).await;
        // As where another branch of a select! is ready.
        let departing = [mover.take(stream).unwrap()];
        drop(mover.send_all_async(departing, &mut here));
        let mut stream = TcpStream::from_std(mover.came_back().pop().unwrap().value).unwrap();
        assert_alive(&mut stream, &peer).await;
    });
}

fn a_panic_in_the_terms_is_told() {
    run(async {
        let (stream, peer) = connect().await;
        let (mut here, there) = duplex(4096);
        let terms = Terms::default().accept_if(|_| panic!("as a test wants it"));
        let mut arrivals = Mover::new().unwrap().listen_async_for(there, terms);
        match Mover::new().unwrap().take(stream).unwrap().send(&mut here).await {
            Outcome::Stays(mut stream, _) => assert_alive(&mut stream, &peer).await,
            other => panic!("{other:?}"),
        }
        let error = arrivals.next().await.unwrap_err();
        assert!(error.to_string().contains("panic"), "{error}");
        assert!(arrivals.next().await.unwrap().is_none());
    });
}

fn what_is_refused_serves_on() {
    run(async {
        let (stream, peer) = connect().await;
        let (mut here, there) = duplex(4096);
        let terms = Terms::default().accept_if(|_| Err("not today".into()));
        let mut arrivals = Mover::new().unwrap().listen_async_for(there, terms);
        match Mover::new().unwrap().take(stream).unwrap().send(&mut here).await {
            Outcome::Stays(mut stream, error) => {
                assert_eq!(error.kind(), ErrorKind::Refused);
                assert_alive(&mut stream, &peer).await;
            }
            other => panic!("{other:?}"),
        }
        drop(here);
        assert!(arrivals.next().await.unwrap().is_none());
    });
}

/// On the only thread of the executor another task runs while nobody answers.
fn the_executor_goes_on_meanwhile() {
    run(async {
        let (stream, peer) = connect().await;
        let mut limits = Limits::default();
        limits.start = Duration::from_millis(200);
        let mover = Mover::with(limits).unwrap();
        let (mut here, _there) = duplex(4096);
        let mut turns = 0;
        let send = mover.take(stream).unwrap().send(&mut here);
        tokio::pin!(send);
        let outcome = loop {
            tokio::select! {
                outcome = &mut send => break outcome,
                () = tokio::task::yield_now() => turns += 1,
            }
        };
        assert!(turns > 100, "{turns} turns of another task");
        match outcome {
            Outcome::Stays(mut stream, error) => {
                assert_eq!(error.kind(), ErrorKind::Late);
                assert_alive(&mut stream, &peer).await;
            }
            other => panic!("{other:?}"),
        }
    });
}

/// Reads until something of this kind has been said.
async fn hear(channel: &mut DuplexStream, decoder: &mut Decoder, is_it: impl Fn(&Decoded) -> bool) {
    loop {
        match decoder.decode().unwrap() {
            Decoded::Incomplete => {
                let mut bytes = [0; 4096];
                let length = channel.read(&mut bytes).await.unwrap();
                assert!(length > 0, "more was to come");
                decoder.feed(&bytes[..length]);
            }
            heard if is_it(&heard) => return,
            _ => {}
        }
    }
}

fn through_a_buffer_the_last_words_of_a_source_arrive() {
    run(async {
        let (stream, peer) = connect().await;
        let (here, mut there) = duplex(1 << 20);
        let mut here = BufStream::new(here);
        let send = Mover::new().unwrap().take(stream).unwrap().send(&mut here);
        let target = async {
            let decoder = &mut Decoder::new();
            let mut writer = Writer::new(Vec::new()).unwrap();
            there.write_all(&std::mem::take(writer.get_mut())).await.unwrap();
            hear(&mut there, decoder, |heard| matches!(heard, Decoded::Message(Message::Connection { .. })))
                .await;
            writer.send(&Message::Refused { connection: 1, reason: "not today".into() }).unwrap();
            writer.end().unwrap();
            there.write_all(writer.get_mut()).await.unwrap();
            hear(&mut there, decoder, |heard| matches!(heard, Decoded::End)).await;
        };
        let both = async { tokio::join!(send, target).0 };
        match tokio::time::timeout(soccr_lab::LIMIT, both).await.unwrap() {
            Outcome::Stays(mut stream, _) => assert_alive(&mut stream, &peer).await,
            other => panic!("{other:?}"),
        }
    });
}

fn through_a_buffer_the_last_words_of_a_target_arrive() {
    run(async {
        let (mut here, there) = duplex(1 << 20);
        let mut arrivals = Mover::new().unwrap().listen_async(BufStream::new(there));
        let begin =
            Message::Begin { connections: 1, answers: true, notes: false, place: None, steered: None };
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.send(&begin).unwrap();
        // That is not for a source to say.
        writer.send(&Message::Ready { connection: 1 }).unwrap();
        here.write_all(writer.get_mut()).await.unwrap();
        assert_eq!(arrivals.next().await.unwrap_err().kind(), ErrorKind::Violation);
        hear(&mut here, &mut Decoder::new(), |heard| matches!(heard, Decoded::End)).await;
    });
}

fn who_stops_listening_has_told_the_source() {
    run(async {
        let (stream, peer) = connect().await;
        // No word fits into it as a whole.
        let (mut here, there) = duplex(8);
        let mut arrivals = Mover::new().unwrap().listen_async(BufStream::new(there));
        let send = async { Mover::new().unwrap().take(stream).unwrap().send(&mut here).await };
        let listen = async move { arrivals.next().await.unwrap().unwrap().into_stream().unwrap() };
        let (outcome, mut stream) = tokio::join!(send, listen);
        assert!(outcome.is_moved(), "{outcome:?}");
        assert_alive(&mut stream, &peer).await;
    });
}
