//! How much of its speed is brought back to a connection.

use soccr::Connection;
use soccr::connection::Path;
use soccr::settings::Settings;

/// How much is brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Everything, as far as this user may.
    All,
    /// What BPF does not do.
    WithoutBpf,
    /// Neither path nor settings nor the sizes of the buffers.
    Plain,
}

impl Effort {
    pub(crate) const ALL: [(Self, &'static str); 3] =
        [(Self::Plain, "plain"), (Self::WithoutBpf, "without BPF"), (Self::All, "everything")];

    pub(crate) fn reduce(self, connection: &mut Connection) {
        match self {
            Self::All => {}
            // Zero leaves as it is.
            Self::WithoutBpf => {
                let path = connection.path.unwrap_or_default();
                connection.path = Some(Path { snd_cwnd: 0, snd_ssthresh: 0, ..path });
                connection.control.options.ecn = false;
            }
            Self::Plain => {
                connection.path = None;
                connection.settings = Settings::default();
                connection.buffers = None;
                connection.control.options.ecn = false;
            }
        }
    }
}
