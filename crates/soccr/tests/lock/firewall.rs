//! A firewall that trusts nobody.

use soccr_netlink::{APPEND, Batch, CREATE, Family, Message, REQUEST, Socket};

/// A firewall for the network of the calling thread: `policy drop; ct state established accept`, in both directions
/// and on `lo` too; only what begins a connection passes besides.
pub fn let_established_connections_pass() {
    const SUBSYSTEM: u16 = 10 << 8;
    let mut batch = Batch::new();
    batch.message(0x10, REQUEST, |m| m.bytes(&[0, 0, 0, 10]));
    let mut add = |kind: u16, body: &dyn Fn(&mut Message<'_>)| {
        batch.message(SUBSYSTEM | kind, REQUEST | CREATE | APPEND, |m| {
            m.bytes(&[1, 0, 0, 0]);
            m.string(1, "strict");
            body(m);
        });
    };
    let expression = |list: &mut Message<'_>, name: &str, data: &dyn Fn(&mut Message<'_>)| {
        list.nested(1, |element| {
            element.string(1, name);
            element.nested(2, data);
        });
    };
    let accept_where = |list: &mut Message<'_>, value: &[u8]| {
        expression(list, "cmp", &|d| {
            d.be32(1, 8);
            d.be32(2, 0);
            d.nested(3, |v| v.attribute(1, value));
        });
        expression(list, "immediate", &|d| {
            d.be32(1, 0);
            d.nested(2, |v| v.nested(2, |verdict| verdict.be32(1, 1)));
        });
    };
    add(0, &|_| ());
    for (chain, hook) in [("in", 1), ("out", 3)] {
        add(3, &|m| {
            m.string(3, chain);
            m.nested(4, |h| {
                h.be32(1, hook);
                h.be32(2, 0);
            });
            m.be32(5, 0); // policy drop
            m.string(7, "filter");
        });
        add(6, &|m| {
            m.string(2, chain);
            m.nested(4, |list| {
                expression(list, "ct", &|d| {
                    d.be32(1, 8);
                    d.be32(2, 0); // ct state
                });
                accept_where(list, &2u32.to_ne_bytes()); // established
            });
        });
        add(6, &|m| {
            m.string(2, chain);
            m.nested(4, |list| {
                expression(list, "payload", &|d| {
                    d.be32(1, 8);
                    d.be32(2, 2); // transport header
                    d.be32(3, 13);
                    d.be32(4, 1);
                });
                accept_where(list, &[2]); // a SYN and nothing else
            });
        });
    }
    batch.acknowledge_last();
    batch.message(0x11, REQUEST, |m| m.bytes(&[0, 0, 0, 10]));
    Socket::open(Family::Netfilter).unwrap().transact(&batch).unwrap();
}
