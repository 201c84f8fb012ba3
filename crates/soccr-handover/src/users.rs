//! [`Users`]: others who use the sockets of connections that leave.

use crate::error::Result;

/// Whoever else uses the sockets of connections that leave, such as the processes that they belong to.
///
/// They must not run while a connection is in no socket: they would see its end. They are stopped when the connections of a window
/// are locked, and go on when each of these has arrived, or is back.
pub trait Users: Send {
    /// Stops them, if they are not stopped yet. None of them runs when this returns.
    ///
    /// # Errors
    /// They cannot be stopped: nothing leaves.
    fn stop(&mut self) -> Result<()>;

    /// Lets them go on.
    ///
    /// # Errors
    /// They cannot go on.
    fn go_on(&mut self) -> Result<()>;

    /// The connection with this number (from 0, in the order in which they were given) is being put back. Should this process die now,
    /// the incomplete connection in its socket must not come to life.
    ///
    /// # Errors
    /// Nobody takes note.
    fn filling(&mut self, number: usize) -> Result<()> {
        let _ = number;
        Ok(())
    }

    /// Whether any of them still has the socket with this number. Asked if they have gone on while its connection was in no socket: they may
    /// have closed theirs, and what comes back into it would end with this process.
    ///
    /// # Errors
    /// Nobody knows: the connection counts as one that none of them has.
    fn have(&mut self, number: usize) -> Result<bool> {
        let _ = number;
        Ok(true)
    }

    /// The connection is back, and complete.
    ///
    /// # Errors
    /// Nobody takes note.
    fn filled(&mut self, number: usize) -> Result<()> {
        let _ = number;
        Ok(())
    }
}
