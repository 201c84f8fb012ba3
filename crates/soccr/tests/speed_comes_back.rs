//! A connection is as fast after the move as it was before.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use soccr::pause;
use soccr_lab::{Family, Pair, Shape};

soccr_lab::tests![look];

fn look() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let pair = Pair::shaped(&Shape::rtt(Duration::from_millis(20))).unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        let mut a = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, 80))).unwrap();
        let (mut b, _) = listener.accept().unwrap();
        let data = vec![7; 1 << 20];
        std::thread::scope(|s| {
            s.spawn(|| a.write_all(&data).unwrap());
            let mut r = vec![0; data.len()];
            b.read_exact(&mut r).unwrap();
        });
        std::thread::scope(|s| {
            s.spawn(|| b.write_all(&data).unwrap());
            let mut r = vec![0; data.len()];
            a.read_exact(&mut r).unwrap();
        });
        for _ in 0..3 {
            let p = pause(&a).unwrap();
            let c = p.save().unwrap();
            p.detach().unwrap();
            let t = std::time::Instant::now();
            let r = pair.a.run(|| c.restore()).unwrap();
            eprintln!("{family:?} {:?} {:?}", t.elapsed(), c.path);
            for e in r.report().iter() {
                eprintln!("   {e}");
            }
            a = r.resume().unwrap();
            a.write_all(b"hello").unwrap();
            let mut r = [0; 5];
            b.read_exact(&mut r).unwrap();
            b.write_all(b"hello").unwrap();
            a.read_exact(&mut r).unwrap();
        }
    }
}
