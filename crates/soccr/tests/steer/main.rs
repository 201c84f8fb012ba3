//! Steering on real networks: a peer, a router, and three hosts of which one has the address.

mod delivery;
#[path = "../lock/firewall.rs"]
mod firewall;
mod moves;
mod tables;
mod traffic;

use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode};

use soccr::Flow;
use soccr::steer::{Foreign, NextHop, Numbers, redirect, stop};
use soccr_lab::{Host, Lan, Test, harness};

fn main() -> ExitCode {
    macro_rules! tests {
        ($($name:path),* $(,)?) => { [$(Test::new(stringify!($name), $name)),*] };
    }
    harness(tests![
        moves::a_connection_wanders_while_data_flows_ipv4,
        moves::a_connection_wanders_while_data_flows_ipv6,
        moves::requests_are_answered_wherever_the_connection_is,
        moves::the_path_mtu_changes_while_steered_ipv4,
        moves::the_path_mtu_changes_while_steered_ipv6,
        moves::a_strict_firewall_lets_a_foreign_connection_pass,
        moves::a_half_closed_connection_is_restored_where_its_address_is_not,
        moves::transparent_only_where_the_address_is_not,
        moves::neighbours_hear_nothing_of_it,
        moves::the_new_host_takes_the_address,
        tables::many_are_added_moved_and_removed,
        tables::what_is_steered_is_counted,
        tables::an_entry_ends_with_its_connection,
        tables::a_new_connection_with_the_same_ports_is_not_steered,
        tables::who_stays_away_is_steered_again,
        tables::two_processes_at_once,
        tables::a_next_hop_that_is_none_is_refused,
        tables::nothing_is_left_behind,
        delivery::numbers_of_others_are_refused,
        delivery::an_address_is_delivered_once,
        delivery::what_no_socket_has_is_dropped,
        delivery::without_it_a_foreign_address_is_refused,
    ])
}

/// The addresses of a family.
fn address(host: &Host, ipv6: bool) -> IpAddr {
    if ipv6 { host.v6.into() } else { host.v4.into() }
}

/// A connection of the peer to the first host: the end of the peer, and that of the host.
fn connect(lan: &Lan, ipv6: bool) -> (TcpStream, TcpStream) {
    let home = address(&lan.hosts[0], ipv6);
    let listener = lan.hosts[0].run(|| TcpListener::bind((home, 80))).unwrap();
    let peer = lan.peer.run(|| TcpStream::connect((home, 80))).unwrap();
    let (ours, _) = listener.accept().unwrap();
    (peer, ours)
}

/// Makes the first host steer a connection to another, or deliver it itself.
fn steer(lan: &Lan, flow: Flow, to: usize) {
    let ipv6 = !flow.is_ipv4();
    lan.hosts[0].run(|| {
        if to == 0 {
            assert_eq!(stop(&[flow]).unwrap(), 1);
        } else {
            let hop = NextHop::new(address(&lan.hosts[to], ipv6)).unwrap();
            redirect(&[flow], &hop).unwrap();
        }
    });
}

/// Makes another host deliver what is for the first one.
fn deliver(lan: &Lan, to: usize, ipv6: bool) {
    if to != 0 {
        let home = address(&lan.hosts[0], ipv6);
        lan.hosts[to].run(|| Foreign::deliver(home, Numbers::default())).unwrap();
    }
}

/// What a program says about the network of the calling thread; `None` where it is not installed.
fn say(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}
