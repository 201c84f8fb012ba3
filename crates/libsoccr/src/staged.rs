//! A restore in stages: the caller binds and connects, and fills the queues before or after the final step.

use soccr_core::connection::{ControlBlock, Flow, Urgent};
use soccr_core::{Queue, Restore, Result};

/// What has been done of a restore in stages.
#[derive(Debug)]
pub(crate) struct Staged {
    steps: Restore<'static>,
    urgent: Option<Urgent>,
    receive_queue_missing: bool,
    send_queue_missing: bool,
    connected: bool,
    /// The final step has been asked for, and waits for the queues.
    pub(crate) finishing: bool,
}

impl Staged {
    pub(crate) fn new(steps: Restore<'static>, control: &ControlBlock, urgent: Option<Urgent>) -> Self {
        Self {
            steps,
            urgent,
            receive_queue_missing: control.inq_len > 0,
            send_queue_missing: control.outq_len > 0,
            connected: false,
            finishing: false,
        }
    }

    /// The caller has bound and connected the socket, to the addresses of `flow` if he has told them.
    pub(crate) fn connect(&mut self, flow: Option<Flow>) -> Result<()> {
        if !self.connected {
            self.steps.connected(flow)?;
            self.connected = true;
        }
        Ok(())
    }

    pub(crate) fn fill(&mut self, queue: Queue, bytes: &[u8], flow: Option<Flow>) -> Result<()> {
        self.connect(flow)?;
        match queue {
            Queue::Receive => {
                self.steps.receive_queue(bytes, self.urgent)?;
                self.receive_queue_missing = false;
            }
            Queue::Send => {
                self.steps.send_queue(bytes)?;
                self.send_queue_missing = false;
            }
        }
        Ok(())
    }

    pub(crate) fn misses(&self, queue: Queue) -> bool {
        match queue {
            Queue::Receive => self.receive_queue_missing,
            Queue::Send => self.send_queue_missing,
        }
    }

    /// Both queues are there.
    pub(crate) fn is_full(&self) -> bool {
        !self.receive_queue_missing && !self.send_queue_missing
    }

    pub(crate) fn into_steps(self) -> Restore<'static> {
        self.steps
    }
}
