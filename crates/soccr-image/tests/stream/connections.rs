//! Connections to test with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use proptest::prelude::*;
use soccr::Connection;
use soccr::connection::{
    Buffers, ControlBlock, Options, Owner, Path, QUEUE_LIMIT, State, Urgent, Window, WindowScale,
};
use soccr::settings::{Settings, Value};

/// A small connection in which every field is in use.
pub fn sample() -> Connection {
    let mut settings = Settings::default();
    settings.set("TCP_NODELAY", Value::Number(1));
    settings.set("SO_LINGER", Value::Bytes(vec![1, 0, 0, 0, 5, 0, 0, 0]));
    settings.set("TCP_MD5SIG", Value::Secret(b"key".to_vec()));
    Connection {
        local: SocketAddrV6::new("fe80::1".parse().unwrap(), 4000, 7, 3).into(),
        remote: SocketAddrV6::new("fe80::2".parse().unwrap(), 5000, 0, 3).into(),
        control: ControlBlock {
            state: State::FinWait1,
            rcv_nxt: 5,
            inq_len: 9,
            write_seq: 2,
            outq_len: 11,
            unsq_len: 4,
            fin_unsent: true,
            reset: false,
            options: Options {
                mss_clamp: 1440,
                window_scale: Some(WindowScale { snd: 7, rcv: 10 }),
                sack: true,
                timestamps: Some(0xdead_beef),
                microseconds: true,
                ecn: true,
                ecn_seen: false,
                syn_data: true,
            },
            window: Some(Window { snd_wl1: 5, snd_wnd: 1000, max_window: 2000, rcv_wnd: 3000, rcv_wup: 1 }),
        },
        receive_queue: b"unread by".to_vec(),
        send_queue: b"sent unsent".to_vec(),
        urgent: Some(Urgent { offset: 3, consumed: true }),
        buffers: Some(Buffers { send: 87_040, receive: 131_072, lock: 1 }),
        path: Some(Path {
            rtt: Duration::from_micros(20_125),
            rttvar: Duration::from_micros(900),
            rto: Duration::from_millis(221),
            snd_mss: 1428,
            snd_cwnd: 31,
            snd_ssthresh: 17,
            rcv_ssthresh: 60_000,
        }),
        settings,
        nonblocking: true,
        tracked: None,
        owner: None,
        tls: None,
    }
}

/// An idle connection, as most are.
pub fn idle() -> Connection {
    let mut connection = sample();
    connection.control.state = State::Established;
    connection.control.fin_unsent = false;
    connection.set_queues(Vec::new(), Vec::new());
    connection.control.unsq_len = 0;
    connection.urgent = None;
    connection
}

/// Puts other queues in, and the lengths with them.
pub trait SetQueues {
    fn set_queues(&mut self, receive: Vec<u8>, send: Vec<u8>);
}

impl SetQueues for Connection {
    fn set_queues(&mut self, receive: Vec<u8>, send: Vec<u8>) {
        (self.control.inq_len, self.control.outq_len) = (receive.len() as u32, send.len() as u32);
        (self.receive_queue, self.send_queue) = (receive, send);
    }
}

fn addresses() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    let v4 = (any::<[[u8; 4]; 2]>(), any::<bool>()).prop_map(|(ips, mapped)| {
        ips.map(|ip| {
            let ip = Ipv4Addr::from(ip);
            let ip = if ip.is_unspecified() { Ipv4Addr::LOCALHOST } else { ip };
            if mapped { IpAddr::V6(ip.to_ipv6_mapped()) } else { IpAddr::V4(ip) }
        })
    });
    let v6 = any::<[[u8; 15]; 2]>().prop_map(|ips| {
        ips.map(|ip| {
            let mut bytes = [0xfd; 16];
            bytes[1..].copy_from_slice(&ip);
            IpAddr::V6(Ipv6Addr::from(bytes))
        })
    });
    (prop_oneof![v4, v6], any::<[(u32, u32); 2]>(), [1..=u16::MAX, 1..=u16::MAX]).prop_map(
        |(ips, extras, ports)| {
            let end = |i: usize| match ips[i] {
                IpAddr::V4(ip) => SocketAddr::from((ip, ports[i])),
                IpAddr::V6(ip) => SocketAddrV6::new(ip, ports[i], extras[i].0, extras[i].1).into(),
            };
            (end(0), end(1))
        },
    )
}

fn options() -> impl Strategy<Value = Options> {
    let scale = proptest::option::of((0..=14u8, 0..=14u8).prop_map(|(snd, rcv)| WindowScale { snd, rcv }));
    (1..=u16::MAX, scale, any::<Option<u32>>(), any::<[bool; 5]>()).prop_map(
        |(mss_clamp, window_scale, timestamps, [sack, microseconds, ecn, ecn_seen, syn_data])| Options {
            mss_clamp,
            window_scale,
            sack,
            timestamps,
            microseconds,
            ecn,
            ecn_seen,
            syn_data,
        },
    )
}

fn settings() -> impl Strategy<Value = Settings> {
    let value = prop_oneof![
        any::<i32>().prop_map(Value::Number),
        proptest::collection::vec(any::<u8>(), 0..300).prop_map(Value::Bytes),
        proptest::collection::vec(any::<u8>(), 0..300).prop_map(Value::Secret),
    ];
    proptest::collection::vec(("[A-Z][A-Z0-9_]{0,63}", value), 0..8).prop_map(|list| {
        let mut settings = Settings::default();
        list.into_iter().for_each(|(name, value)| settings.set(&name, value));
        settings
    })
}

fn path() -> impl Strategy<Value = Option<Path>> {
    any::<Option<([u64; 3], [u32; 4])>>().prop_map(|path| {
        path.map(|(times, numbers)| Path {
            // Up to 37 minutes, 2^26 segments and an int: more is refused.
            rtt: Duration::from_nanos(times[0] >> 23),
            rttvar: Duration::from_nanos(times[1] >> 23),
            rto: Duration::from_nanos(times[2] >> 23),
            snd_mss: numbers[0] >> 16,
            snd_cwnd: numbers[1] >> 6,
            snd_ssthresh: numbers[2] >> 1,
            rcv_ssthresh: numbers[3] >> 1,
        })
    })
}

fn queue() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => proptest::collection::vec(any::<u8>(), 0..40),
        // Around the sizes at which readers change their ways.
        1 => (prop_oneof![Just(8_000usize), Just(262_144), Just(520_000)], 0..400usize, any::<u8>())
            .prop_map(|(size, more, seed)| (0..size + more).map(|i| (i as u8).wrapping_mul(seed | 1)).collect()),
    ]
}

/// Any connection that is valid.
pub fn connection() -> impl Strategy<Value = Connection> {
    use State::*;
    let state = prop_oneof![
        Just(Established),
        Just(SynSent),
        Just(FinWait1),
        Just(FinWait2),
        Just(Close),
        Just(CloseWait),
        Just(LastAck),
        Just(Closing),
    ];
    let buffers = any::<Option<(u32, u32, u32)>>();
    let window = any::<Option<(u32, u32, u32, u32)>>();
    let marks = (any::<u32>(), any::<u32>(), any::<u32>(), any::<Option<(u32, bool)>>(), any::<[bool; 2]>());
    (addresses(), state, options(), settings(), path(), queue(), queue(), buffers, window, marks).prop_map(
        |((local, remote), state, options, settings, path, receive, send, buffers, window, marks)| {
            let (rcv_nxt, write_seq, unsent, urgent, [fin_unsent, nonblocking]) = marks;
            let receive_queue = if state == SynSent { Vec::new() } else { receive };
            let send_queue = if state == SynSent || state.fin_acknowledged() { Vec::new() } else { send };
            let (inq_len, outq_len) = (receive_queue.len() as u32, send_queue.len() as u32);
            assert!(inq_len.max(outq_len) <= QUEUE_LIMIT);
            let unsq_len = unsent % (outq_len + 1);
            let connection = Connection {
                local,
                remote,
                control: ControlBlock {
                    state,
                    rcv_nxt,
                    inq_len,
                    write_seq,
                    outq_len,
                    unsq_len,
                    fin_unsent: state.fin_queued()
                        && !state.fin_acknowledged()
                        && (fin_unsent || unsq_len > 0),
                    reset: fin_unsent
                        && outq_len == 0
                        && matches!(state, State::Established | State::CloseWait),
                    options,
                    window: window.map(|(wl1, wnd, more, rcv)| Window {
                        snd_wl1: rcv_nxt.wrapping_sub(wl1 >> 2),
                        snd_wnd: wnd >> 3,
                        max_window: (wnd >> 3) + (more >> 3),
                        rcv_wnd: rcv >> 2,
                        rcv_wup: rcv_nxt.wrapping_sub(rcv >> 1),
                    }),
                },
                urgent: urgent
                    .filter(|_| inq_len > 0)
                    .map(|(offset, consumed)| Urgent { offset: offset % inq_len.max(1), consumed }),
                receive_queue,
                send_queue,
                buffers: buffers.map(|(send, receive, lock)| Buffers {
                    send: send >> 1,
                    receive: receive >> 1,
                    lock: lock & 3,
                }),
                path,
                settings,
                nonblocking,
                tracked: None,
                owner: (rcv_nxt & 1 == 1).then_some(Owner { user: write_seq, group: rcv_nxt }),
                tls: None,
            };
            connection.validate().unwrap();
            connection
        },
    )
}
