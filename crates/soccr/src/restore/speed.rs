//! What makes a restored connection as fast as it was: round-trip time, congestion window and threshold, ECN.

use std::os::fd::BorrowedFd;

use rustix::net::connect_unspec;

use super::Restore;
use super::bind::{bind_alone, connect};
use crate::congestion;
use crate::connection::{ControlBlock, Flow, Path};
use crate::error::{Error, Result};
use crate::rtt::Seed;
use crate::sys::raw::Injectors;
use crate::sys::tcp::{self, Queue, TcpInfo, info_option};

/// What is known of the speed of a connection, and what has come of it.
#[derive(Debug, Default)]
pub(super) struct Speed {
    path: Option<Path>,
    pub(super) window_clamp: Option<u32>,
    seed: Option<Seed>,
    /// Why the round-trip time does not come back.
    untimed: Option<String>,
}

impl Speed {
    pub(super) fn new(path: Path, control: &ControlBlock, fd: BorrowedFd<'_>) -> Result<Self> {
        path.validate()?;
        let (seed, untimed) = match Seed::new(&path, control, fd) {
            Ok(seed) => (seed, None),
            Err(reason) => (None, Some(reason.to_owned())),
        };
        Ok(Self { path: Some(path), window_clamp: None, seed, untimed })
    }

    pub(super) fn has_path(&self) -> bool {
        self.path.is_some()
    }
}

/// There is something to control: it may send again, and what it knew about that was saved.
pub(super) fn has_congestion(control: &ControlBlock, path: Option<&Path>) -> bool {
    let sends = !control.state.fin_acknowledged() && !control.reset;
    sends && (path.is_some() || control.options.ecn)
}

impl Restore<'_> {
    /// Step 1, too: what the connection had learned about its path comes back as well, as far as this kernel and this user
    /// can do that. What is zero is not known.
    ///
    /// # Errors
    /// Invalid: values that no kernel reports. System: the option.
    pub fn path(mut self, path: Path) -> Result<Self> {
        let speed = Speed::new(path, &self.control, self.fd).map_err(|error| error.at("restore"))?;
        self.speed = Speed { window_clamp: self.speed.window_clamp, ..speed };
        self.set_send_seq().map_err(|error| error.at("restore"))?;
        Ok(self)
    }

    /// Step 1, too: the limit of the receive window, `TCP_WINDOW_CLAMP`.
    pub fn window_clamp(mut self, bytes: u32) -> Self {
        self.speed.window_clamp = Some(bytes);
        self
    }

    /// Where the send queue begins, with sequence numbers to spare in front of it for the samples of the round-trip time.
    pub(super) fn set_send_seq(&self) -> Result<()> {
        let spare = self.speed.seed.map_or(0, |seed| seed.samples());
        let first = self.control.first_unacknowledged().wrapping_sub(spare);
        tcp::set_queue_seq(self.fd, Queue::Send, first)
    }

    /// Step 3, behind the options: lets the kernel measure the round-trip time. False where it could not: then the socket
    /// has been connected anew, and has lost what is set in repair mode.
    pub(super) fn seed(&mut self, injectors: &mut Injectors, flow: Flow) -> Result<bool> {
        let Some(seed) = self.speed.seed.take() else { return Ok(true) };
        self.open_window_at(self.control.copied_seq())?;
        let Err(error) = seed.sow(injectors, self.fd, self.wire()?, &self.control) else { return Ok(true) };
        self.speed.untimed = Some(error.to_string());
        // Its send queue holds a byte that nobody wrote. In repair mode nothing of this is sent.
        connect_unspec(self.fd).map_err(|error| Error::system("connect(AF_UNSPEC)", error))?;
        self.set_unbound()?;
        // A port that connect(2) has chosen is gone, whatever getsockname(2) says.
        match bind_alone(self.fd, flow.local, false) {
            Err(error) if error.errno() == Some(libc::EINVAL) => {}
            bound => bound?,
        }
        connect(self.fd, flow)?;
        self.set_options(flow)?;
        Ok(false)
    }

    /// In the end: brings back congestion window, threshold and ECN, and reports how fast the connection will be. `info` is
    /// what the kernel has told of the socket.
    pub(super) fn restore_speed(&mut self, info: TcpInfo) -> Result<()> {
        if let Some(bytes) = self.speed.window_clamp {
            let name = libc::TCP_WINDOW_CLAMP;
            tcp::set_int(self.fd, tcp::SOL_TCP, name, "TCP_WINDOW_CLAMP", bytes as i32)?;
        }
        if !has_congestion(&self.control, self.speed.path.as_ref()) {
            return Ok(());
        }
        let before = tcp::congestion(self.fd)?;
        let (info, unwritten) = self.restore_congestion(info, &before)?;
        let now = tcp::congestion(self.fd)?;
        if now != before {
            self.report.algorithm(&now, unwritten.clone());
        }
        let Speed { path, untimed, .. } = std::mem::take(&mut self.speed);
        self.report.speed(path.as_ref(), self.control.options.ecn, &info, untimed, unwritten);
        Ok(())
    }

    /// Returns what the socket has then, and why it is not what it was.
    fn restore_congestion(&self, info: TcpInfo, algorithm: &[u8]) -> Result<(TcpInfo, Option<String>)> {
        let (fd, options) = (self.fd, &self.control.options);
        let path = self.speed.path.unwrap_or_default();
        let is_back = (info.options & info_option::ECN != 0) == options.ecn
            && [(info.snd_cwnd, path.snd_cwnd), (info.snd_ssthresh, path.snd_ssthresh)]
                .iter()
                .all(|(now, before)| now == before || *before == 0);
        if is_back {
            let restarted = congestion::restart(fd, algorithm);
            return Ok((info, restarted.err().map(|reason| reason.to_string())));
        }
        let restored = congestion::restore(fd, &path, options.ecn, options.ecn_seen, algorithm)
            .or_else(|reason| congestion::restart(fd, algorithm).and(Err(reason)));
        Ok((tcp::info(fd)?, restored.err().map(|reason| reason.to_string())))
    }
}
