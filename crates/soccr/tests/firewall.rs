//! Moves beside firewalls that other people have set up: they work, or say why not. The firewalls are made by the
//! program `nft`; where it is not installed, the tests say so and pass over it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use soccr::{ErrorKind, Flow, Lock};
use soccr_lab::{Family, Flags, Host, Pair, Sniffer, State, TcpInfo, Test, harness, sysctl, wait_until};

fn main() -> ExitCode {
    let tests = [
        Test::new("invalid_packets_are_dropped", || {
            moves_beside(
                "chain input { type filter hook input priority 0; ct state invalid drop; }
                 chain output { type filter hook output priority 0; ct state invalid drop; }",
            );
        }),
        Test::new("only_what_is_established_may_pass", || {
            moves_beside(
                "chain input { type filter hook input priority 0; policy drop;
                               ct state established accept; tcp dport 80 ct state new accept; }
                 chain output { type filter hook output priority 0; policy drop; ct state established accept; }",
            );
        }),
        Test::new("only_what_is_established_may_enter_but_lo_is_free", || {
            moves_beside(
                "chain input { type filter hook input priority 0; policy drop;
                               iif lo accept; ct state established accept; tcp dport 80 ct state new accept; }",
            );
        }),
        Test::new("reverse_paths_are_checked", || moves_beside("")),
        Test::new("a_firewall_that_swallows_our_mark_is_named", a_firewall_that_swallows_our_mark_is_named),
    ];
    harness(tests)
}

/// A connection from `a` to a listener on `b`, behind the firewall of `b`, with bytes that wait on both sides.
struct Behind {
    pair: Pair,
    peer: TcpStream,
    ours: TcpStream,
}

impl Behind {
    fn firewall(rules: &str) -> Option<Self> {
        let pair = Pair::new().unwrap();
        pair.b.run(|| {
            for device in ["all", "lo", "eth0"] {
                sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "1").unwrap();
            }
        });
        if !apply(&pair.b, rules) {
            eprintln!("skipped: nft is not installed");
            return None;
        }
        let address = pair.b.address(Family::V4, 80);
        let listener = pair.b.run(|| TcpListener::bind(address)).unwrap();
        let mut peer = pair.a.run(|| TcpStream::connect(address)).unwrap();
        let (mut ours, _) = listener.accept().unwrap();
        peer.write_all(b"hello").unwrap();
        ours.write_all(b"hello").unwrap();
        expect(&mut peer, b"hello");
        expect(&mut ours, b"hello");
        peer.write_all(b"unread").unwrap();
        wait_until("the bytes have arrived", || ours.peek(&mut [0; 6]).unwrap() == 6);
        Some(Self { pair, peer, ours })
    }

    fn is_in(&self, state: State) -> bool {
        TcpInfo::of(&self.ours).unwrap().state == state
    }

    /// Moves our end into another socket on the same host.
    fn move_on(&self) -> soccr::Result<TcpStream> {
        self.pair.b.run(|| {
            let lock = Lock::hold(&[Flow::of(&self.ours)?])?;
            let paused = soccr::pause(&self.ours)?;
            let connection = paused.save()?;
            paused.detach()?;
            let restored = connection.restore()?;
            lock.release()?;
            restored.resume()
        })
    }
}

fn moves_beside(rules: &str) {
    for state in [State::Established, State::CloseWait, State::FinWait2] {
        let Some(mut behind) = Behind::firewall(rules) else { return };
        let mut resets = Sniffer::flagged(&behind.pair.a.namespace, "eth0", Flags::RST).unwrap();
        match state {
            State::CloseWait => behind.peer.shutdown(Shutdown::Write).unwrap(),
            State::FinWait2 => behind.ours.shutdown(Shutdown::Write).unwrap(),
            _ => {}
        }
        wait_until("the state is reached", || behind.is_in(state));
        match behind.move_on() {
            Ok(mut ours) => {
                expect(&mut ours, b"unread");
                if state != State::FinWait2 {
                    ours.write_all(b"goes on").unwrap();
                    expect(&mut behind.peer, b"goes on");
                }
                if state != State::CloseWait {
                    behind.peer.write_all(b"and back").unwrap();
                    expect(&mut ours, b"and back");
                }
            }
            Err(error) => {
                let text = error.to_string();
                assert_ne!(state, State::Established, "nothing is injected there: {text}");
                assert_eq!(error.kind(), ErrorKind::Refused, "{text}");
                assert!(text.contains("0xC114") && text.contains("firewall"), "{text}");
            }
        }
        assert_eq!(resets.segments().unwrap(), [], "{state:?}");
    }
}

fn a_firewall_that_swallows_our_mark_is_named() {
    let rules = "chain input { type filter hook input priority 0; meta mark 0xC114 drop; }";
    let Some(behind) = Behind::firewall(rules) else { return };
    behind.peer.shutdown(Shutdown::Write).unwrap();
    wait_until("the FIN has arrived", || behind.is_in(State::CloseWait));
    let error = behind.move_on().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("0xC114"), "{error}");
}

/// Loads rules into a host's firewall; false where `nft` is not installed.
fn apply(host: &Host, rules: &str) -> bool {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    let Ok(mut nft) = host.run(|| command.spawn()) else { return false };
    write!(nft.stdin.take().unwrap(), "table inet others {{\n{rules}\n}}\n").unwrap();
    assert!(nft.wait().unwrap().success());
    true
}

#[track_caller]
fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.read_exact(&mut read).unwrap();
    assert_eq!(read, bytes);
}
