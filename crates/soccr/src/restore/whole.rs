//! [`Connection::restore`]: all steps in their order, and what makes the connection as fast as it was.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::Restore;
use super::anew::{bind_anew, restore_buffers};
use super::port::bind_and_connect;
use super::scope::scoped_here;
use super::speed::has_congestion;
use crate::congestion;
use crate::connection::{Connection, ControlBlock, Flow, Owner, State};
use crate::error::{Error, Result};
use crate::resume::{Restored, set_nonblocking};
use crate::settings::{self, Skipped, Stage, Value};
use crate::steer;
use crate::sys::owner::as_owner;
use crate::sys::raw::Injectors;
use crate::sys::tcp::{self, Repair};

impl Connection {
    /// Makes a socket with this connection, in the network namespace of the calling thread, in repair mode: complete
    /// and silent until [`Restored::resume`]. The old socket must be closed or [detached](crate::Paused::detach).
    ///
    /// Do not wait long before that: after a retransmission timeout, 200 ms at least, the kernel repeats what the peer
    /// has not acknowledged, and takes it for lost.
    ///
    /// Everything is [validated](Self::validate) before the first system call; `self` is not changed, and can be
    /// restored again.
    ///
    /// The socket belongs to its [`owner`](Self::owner), where this process may give it away. Its control group and its security
    /// label are those of this process, and the report tells where they [were](settings::Settings::note_process) others. That nobody
    /// gets its signals any more (`O_ASYNC`, `F_SETOWN`, `F_SETSIG`) is told, too, and that notices of `MSG_ZEROCOPY` never come. Its `SO_COOKIE` is a new one, as that of every socket.
    ///
    /// What the connection had learned about its path comes back as well, as far as this kernel and this user can do
    /// that, and [`Restored::report`] tells how far. Without a [`path`](Self::path), without ECN and without
    /// [`settings`](Self::settings) nothing of that is tried: the quickest restore there is.
    ///
    /// # Errors
    /// - Invalid: values that contradict each other.
    /// - System: the option that the kernel refused. `EADDRNOTAVAIL` where the local address is not configured here,
    ///   or another socket has the same pair of addresses. An IPv6 address that is still tentative is waited for, up to three
    ///   seconds. Nothing has been sent, and nothing is left behind.
    ///   `ENODEV` where no link has the name of that to which link-local addresses belong; its number counts only on its own host.
    /// - Refused: the socket did not reach the state of the connection, because a firewall or a loopback interface
    ///   that is down swallowed the segment that plays the peer's FIN or ACK.
    pub fn restore(&self) -> Result<Restored> {
        self.restore_with(&mut Injectors::default())
    }

    /// The same with raw sockets that may serve other connections too.
    pub(crate) fn restore_with(&self, injectors: &mut Injectors) -> Result<Restored> {
        self.validate().and_then(|()| self.restore_socket(injectors)).map_err(|error| error.at("restore"))
    }

    fn restore_socket(&self, injectors: &mut Injectors) -> Result<Restored> {
        if has_congestion(&self.control, self.path.as_ref()) {
            // The first time it takes long, and from here on the timers of a socket run.
            congestion::prepare();
        }
        let receive_queue = self.raw_receive_queue()?;
        let mut skipped = Vec::new();
        let socket = self.open(&mut skipped)?;
        let flow = scoped_here(socket.as_fd(), self.flow(), &self.settings)?;
        let report = if self.control.state == State::SynSent {
            let report = restore_buffers(socket.as_fd(), self.buffers)?;
            self.apply(socket.as_fd(), Stage::BeforeBind, &mut skipped);
            bind_anew(socket.as_fd(), flow.local, self.control.write_seq)?;
            for stage in [Stage::BeforeConnect, Stage::InRepair, Stage::Injected, Stage::Last] {
                self.apply(socket.as_fd(), stage, &mut skipped);
            }
            report
        } else {
            let control = ControlBlock { inq_len: receive_queue.len() as u32, ..self.control.clone() };
            let mut steps = self.connect(injectors, socket.as_fd(), flow, control, &mut skipped)?;
            steps.fill_receive_queue(injectors, &receive_queue, self.urgent)?;
            steps.fill_send_queue(&self.send_queue)?;
            if let Some(tls) = &self.tls {
                // Behind the bytes that are encrypted already, and before a FIN.
                tls.attach(socket.as_fd())?;
            }
            let info = steps.complete(injectors)?;
            self.apply(socket.as_fd(), Stage::Injected, &mut skipped);
            self.apply(socket.as_fd(), Stage::Last, &mut skipped);
            steps.restore_speed(info)?;
            steps.report
        };
        if self.nonblocking {
            set_nonblocking(socket.as_fd(), true)?;
        }
        let mut restored = Restored {
            control: self.control.clone(),
            flow,
            reuse_address: self.settings.get(settings::REUSEADDR) == Some(&Value::Number(1)),
            report,
            socket,
        };
        restored.report.skipped(skipped);
        Ok(restored)
    }

    /// Steps 1 to 3.
    fn connect<'fd>(
        &self,
        injectors: &mut Injectors,
        fd: BorrowedFd<'fd>,
        flow: Flow,
        control: ControlBlock,
        skipped: &mut Vec<Skipped>,
    ) -> Result<Restore<'fd>> {
        tcp::set_repair(fd, Repair::On)?;
        let mut steps = Restore::start(fd, control, self.buffers, self.path)?;
        self.apply(fd, Stage::BeforeBind, skipped);
        steer::admit_transparent(fd, flow.local, &self.settings)?;
        let free = self.settings.get("IPV6_FREEBIND") == Some(&Value::Number(1));
        bind_and_connect(fd, flow, free, || self.apply(fd, Stage::BeforeConnect, skipped))?;
        steps.set_options(flow)?;
        steps.admit(injectors, self.tracked)?;
        let before = skipped.len();
        self.apply(fd, Stage::InRepair, skipped);
        if !steps.seed(injectors, flow)? {
            skipped.truncate(before);
            self.apply(fd, Stage::InRepair, skipped);
        }
        Ok(steps)
    }

    /// A fresh socket that belongs to whom it did, where that is allowed.
    fn open(&self, skipped: &mut Vec<Skipped>) -> Result<OwnedFd> {
        use rustix::process::{getegid, geteuid};
        let ours = Owner { user: geteuid().as_raw(), group: getegid().as_raw() };
        let Some(owner) = self.owner.filter(|owner| *owner != ours) else { return open(self.local) };
        as_owner(owner.user, owner.group, || open(self.local)).unwrap_or_else(|error| {
            let reason = "it is another user's: needs CAP_SETUID and CAP_SETGID";
            let denied = error.kind() == io::ErrorKind::PermissionDenied;
            skipped.push(Skipped::new("owner", if denied { io::Error::other(reason) } else { error }));
            open(self.local)
        })
    }

    fn apply(&self, fd: BorrowedFd<'_>, stage: Stage, skipped: &mut Vec<Skipped>) {
        self.settings.apply(fd, stage, self.local, skipped);
    }
}

pub(crate) fn open(local: SocketAddr) -> Result<OwnedFd> {
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| Error::system("socket", error))
}
