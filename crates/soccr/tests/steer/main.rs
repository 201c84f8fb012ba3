//! Steering on real networks: a peer, a router, and three hosts of which one has the address.

mod delivery;
mod devices;
#[path = "../lock/firewall.rs"]
mod firewall;
mod homecoming;
mod moves;
mod tables;
mod traffic;
mod tunnels;

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::process::{Command, ExitCode};

use soccr::Flow;
use soccr::steer::{Foreign, NextHop, Numbers, Tunnel, narrow, redirect, redirect_answers, stop};
use soccr_lab::{Host, Lan, Test, harness, skip};

fn main() -> ExitCode {
    macro_rules! tests {
        ($($name:path),* $(,)?) => { [$(Test::new(stringify!($name), $name)),*] };
    }
    if let Ok(ends) = std::env::var(tables::VICTIM) {
        return tables::expect_and_wait(&ends);
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
        moves::a_save_that_cannot_find_out_why_it_is_transparent_fails,
        moves::neighbours_hear_nothing_of_it,
        moves::the_new_host_takes_the_address,
        tables::many_are_added_moved_and_removed,
        tables::named_twice_it_is_steered_once,
        tables::what_is_steered_is_counted,
        tables::an_entry_ends_with_its_connection,
        tables::a_new_connection_with_the_same_ports_is_not_steered,
        tables::who_stays_away_is_steered_again,
        tables::who_waits_for_a_killed_process_is_steered_again,
        tables::two_processes_at_once,
        tables::a_next_hop_that_is_none_is_refused,
        tables::nothing_is_left_behind,
        tables::what_has_ended_makes_room,
        homecoming::by_whichever_device_it_arrives,
        homecoming::by_a_device_with_several_ways_on,
        homecoming::by_a_device_that_is_gone,
        homecoming::while_packets_change_the_sets,
        devices::made_anew_ingress,
        devices::made_anew_egress,
        devices::made_anew_towards_the_old_host,
        devices::by_another_device_than_has_the_address,
        devices::from_the_host_that_steers_here,
        devices::from_two_hosts_at_once,
        delivery::numbers_of_others_are_refused,
        delivery::an_old_host_of_the_other_family_is_refused,
        delivery::an_address_is_delivered_once,
        delivery::what_no_socket_has_is_dropped,
        delivery::what_comes_by_another_device_passes,
        delivery::without_it_a_foreign_address_is_refused,
        delivery::where_any_address_can_be_bound_nothing_changes,
        delivery::where_nobody_tells_who_can_bind_any_address_nothing_changes,
        delivery::a_socket_that_is_free_to_have_any_address_is_refused_one_of_another_host,
        tunnels::a_connection_wanders_between_networks_ipv4,
        tunnels::a_connection_wanders_between_networks_ipv6,
        tunnels::answers_go_back_through_the_old_host_ipv4,
        tunnels::answers_go_back_through_the_old_host_ipv6,
        tunnels::strict_firewalls_let_it_pass_between_networks,
        tunnels::a_firewall_that_lets_no_message_out_is_named,
        tunnels::the_path_mtu_changes_behind_a_tunnel_ipv4,
        tunnels::the_path_mtu_changes_behind_a_tunnel_ipv6,
        tunnels::peers_send_what_fits_into_the_tunnel,
        tunnels::a_tunnel_is_made_once,
        tunnels::a_tunnel_that_is_none_is_refused,
        tunnels::what_rp_filter_would_drop_is_refused,
        tunnels::a_reset_of_the_new_host_ends_the_steering,
        tunnels::nothing_is_left_of_tunnels,
        tunnels::a_tunnel_by_which_packets_come_is_used,
        tunnels::a_tunnel_for_what_has_ended_is_unused,
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

/// Three hosts, and how packets get from the first to the others.
struct Net {
    lan: Lan,
    /// Through tunnels: each host has a network of its own.
    routed: bool,
    /// The others answer through the first host.
    back: bool,
}

impl Net {
    fn flat() -> Self {
        Self { lan: Lan::new().unwrap(), routed: false, back: false }
    }

    fn routed(back: bool) -> Self {
        Self { lan: Lan::routed().unwrap(), routed: true, back }
    }

    /// The tunnel between the first host and another, both ends of it made.
    fn tunnel(&self, to: usize) -> Tunnel {
        let tunnel = self.hosts[0].run(|| Tunnel::to(self.hosts[to].v4.into())).unwrap();
        self.hosts[0].run(|| tunnel.open()).unwrap();
        self.hosts[to].run(|| tunnel.reversed().open()).unwrap();
        tunnel
    }

    /// Another host, as the first one reaches it.
    fn hop(&self, to: usize, ipv6: bool) -> NextHop {
        let find = || match self.routed {
            true => self.tunnel(to).other_end(ipv6),
            false => NextHop::new(address(&self.hosts[to], ipv6)),
        };
        self.hosts[0].run(find).unwrap()
    }

    /// The first host, as another one reaches it.
    fn hop_back(&self, from: usize, ipv6: bool) -> NextHop {
        let find = || match self.routed {
            true => self.tunnel(from).reversed().other_end(ipv6),
            false => NextHop::new(address(&self.hosts[0], ipv6)),
        };
        self.hosts[from].run(find).unwrap()
    }
}

impl Deref for Net {
    type Target = Lan;

    fn deref(&self) -> &Lan {
        &self.lan
    }
}

/// Makes the first host steer a connection to another, or deliver it itself.
fn steer(net: &Net, flow: Flow, to: usize, rcv_nxt: u32) {
    net.hosts[0].run(|| {
        if to == 0 {
            assert_eq!(stop(&[flow]).unwrap(), 1);
            return;
        }
        let hop = net.hop(to, !flow.is_ipv4());
        redirect(&[flow], &hop).unwrap();
        if net.back {
            redirect_answers(&[flow], &hop).unwrap();
        }
        if net.routed {
            narrow(&flow, rcv_nxt, net.tunnel(to).mtu().unwrap()).unwrap();
        }
    });
}

/// Makes another host deliver what is for the first one.
fn deliver(net: &Net, to: usize, ipv6: bool) {
    if to != 0 {
        let (home, hop) = (address(&net.hosts[0], ipv6), net.hop_back(to, ipv6));
        net.hosts[to].run(|| {
            let foreign = Foreign::deliver_from(home, Numbers::default(), Some(&hop)).unwrap();
            if net.back {
                foreign.answer_through(&hop).unwrap();
            }
            foreign.check_arrival(address(&net.peer, ipv6), hop.device()).unwrap();
        });
    }
}

/// What a program says about the network of the calling thread; `None`, and a word about it, where it is not installed.
fn say(program: &str, arguments: &[&str]) -> Option<String> {
    let output = match Command::new(program).args(arguments).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skip(format_args!("there is no {program}(8)"));
            return None;
        }
        output => output.unwrap(),
    };
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// What people see of a host's rules, routes and links.
fn listings(net: &Net, host: usize) -> Option<Vec<String>> {
    net.hosts[host].run(|| {
        let mut all = vec![say("nft", &["list", "ruleset"])?];
        for family in ["-4", "-6"] {
            all.push(say("ip", &[family, "rule"])?);
            all.push(say("ip", &[family, "route", "show", "table", "all"])?);
        }
        all.push(say("ip", &["link"])?);
        Some(all)
    })
}
