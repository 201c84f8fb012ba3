//! The source: it lets connections go, one window after the other.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Id, Violation};

/// What the target says about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// READY: it is in place there, silent. The source may let it go.
    Ready,
    /// TAKEN: it comes to life there.
    Taken,
    /// REFUSED: the target does not take it.
    Refused,
}

/// What happens to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The target has said its first word: it is there, and prepared.
    Hello,
    /// [`Action::Lock`] is done. What could not be locked is not offered.
    Locked,
    /// [`Action::Offer`] is done: the connection is written, or could not be saved.
    Offered(Id, bool),
    /// [`Action::Divert`] is done, or has failed: then nothing leaves.
    Diverted(bool),
    /// [`Action::Commit`] is done: the connection is detached and its COMMIT written, or it is still in its socket.
    Committed(Id, bool),
    /// The target says something about a connection.
    Heard(Id, Answer),
    /// The target has said its last word.
    End,
    /// The time to wait is over, or nothing more is to begin.
    Late,
    /// The channel has failed, and this connection's COMMIT cannot have been read completely. Comes before [`Event::Cut`].
    Unread(Id),
    /// The channel has failed, or the target has ended too early.
    Cut {
        /// The target is proven to have ended without taking any connection.
        proven: bool,
    },
}

/// What a source is to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Silence this range of connections, and stop the users of their sockets. Answered by [`Event::Locked`].
    Lock(Id, Id),
    /// Save the connection and write it. Answered by [`Event::Offered`].
    Offer(Id),
    /// Write ABORT: it stays.
    Abort(Id),
    /// Steer or drop the packets of connections that are [leaving](Source::leaving), so that they draw no reset. Answered by
    /// [`Event::Diverted`].
    Divert,
    /// Write what was held, detach, write COMMIT. Answered by [`Event::Committed`].
    Commit(Id),
    /// Put the value back into the socket that it came from: nobody else has it.
    Return(Id),
    /// End the silence of the window, wherever its connections are, and undo what was arranged for those that stay.
    Unlock(Id, Id),
    /// Write END.
    Finish,
}

/// What has become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// The target has it.
    Moved,
    /// It is in the socket that it was in.
    Stays,
    /// The target has it, or nobody has.
    Unknown,
}

/// The most answers about a connection: READY, TAKEN, and a needless REFUSED. A target that says more floods us.
const WORDS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Here,
    Offered,
    Ready,
    /// The driver is to write its COMMIT.
    Leaving,
    Left,
    Settled(Fate),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Nothing is locked before the target is there.
    Greeting,
    Moving,
    /// END has been said.
    Ending,
    Over,
}

/// The machine of the source. See the [module](super).
///
/// The driver takes the [actions](Self::action) one by one, and reports the outcome of each before anything else.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The stages of connections 1, 2 …
    stages: Vec<Stage>,
    /// The most connections that are silent at a time.
    most: usize,
    /// The connections that are on their way, by index.
    window: Range<usize>,
    phase: Phase,
    /// No further window begins, and the source does not wait for the target's last word.
    late: bool,
    /// How many answers have come.
    words: usize,
    actions: VecDeque<Action>,
}

impl Source {
    /// A source of connections 1 to `count`, of which at most `window` are on their way at a time.
    pub fn new(count: usize, window: usize) -> Self {
        let stages = vec![Stage::Here; count];
        let actions = VecDeque::new();
        Self {
            stages,
            most: window.max(1),
            window: 0..0,
            phase: Phase::Greeting,
            late: false,
            words: 0,
            actions,
        }
    }

    /// The next thing to do. `None`: wait for an event, until [`is_over`](Self::is_over).
    pub fn action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Everything is settled, and nothing is waited for.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over && self.actions.is_empty()
    }

    /// The connections whose [`Action::Commit`] is decided but not done.
    pub fn leaving(&self) -> impl Iterator<Item = Id> {
        self.ids().filter(|id| self.stage(*id) == Some(Stage::Leaving))
    }

    /// What has become of a connection; `None` while that is open.
    pub fn fate(&self, id: Id) -> Option<Fate> {
        match self.stage(id) {
            Some(Stage::Settled(fate)) => Some(fate),
            _ => None,
        }
    }

    /// Takes in what has happened.
    ///
    /// # Errors
    /// The target breaks the protocol. The channel is of no more use: [`Event::Cut`] has to follow.
    pub fn handle(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Hello if self.phase == Phase::Greeting => {
                self.phase = Phase::Moving;
                self.begin_window();
            }
            Event::Hello => return Err(Violation("the target begins twice")),
            Event::Locked => {
                let offers = self.ids().map(Action::Offer);
                self.actions.extend(offers);
            }
            Event::Offered(id, true) => self.set(id, Stage::Offered),
            Event::Offered(id, false) => self.set(id, Stage::Settled(Fate::Stays)),
            Event::Diverted(true) => {
                let commits: Vec<Action> = self.leaving().map(Action::Commit).collect();
                self.actions.extend(commits);
            }
            Event::Diverted(false) => self.keep(&[Stage::Leaving]),
            Event::Committed(id, true) => self.set(id, Stage::Left),
            Event::Committed(id, false) => {
                self.set(id, Stage::Settled(Fate::Stays));
                self.actions.push_front(Action::Abort(id));
            }
            Event::Heard(id, answer) => self.hear(id, answer)?,
            Event::End if self.phase == Phase::Ending => self.over(),
            Event::End if self.phase == Phase::Over => {}
            Event::End => return Err(Violation("the target has ended the hand-over")),
            Event::Late => self.late(),
            Event::Unread(id) => {
                self.come_back(id);
                return Ok(());
            }
            Event::Cut { proven } => self.cut(proven),
        }
        self.go_on();
        Ok(())
    }

    fn hear(&mut self, id: Id, answer: Answer) -> Result<(), Violation> {
        self.words += 1;
        if self.words > WORDS * self.stages.len() {
            return Err(Violation("the target says more than there is to say"));
        }
        let Some(stage) = self.stage(id) else {
            return Err(Violation("the target speaks of a connection that there is not"));
        };
        match (stage, answer) {
            (Stage::Offered, Answer::Ready) => self.set(id, Stage::Ready),
            (Stage::Offered | Stage::Ready, Answer::Refused) => self.set(id, Stage::Settled(Fate::Stays)),
            (Stage::Left, Answer::Taken) => self.set(id, Stage::Settled(Fate::Moved)),
            // It can try that only after the COMMIT.
            (Stage::Left, Answer::Refused) => self.come_back(id),
            // Answers that have crossed with our own words.
            (Stage::Settled(Fate::Stays), Answer::Ready | Answer::Refused) => {}
            _ => return Err(Violation("the target answers what was not asked")),
        }
        Ok(())
    }

    /// The connection is nowhere but here, as a value.
    fn come_back(&mut self, id: Id) {
        if self.stage(id) == Some(Stage::Left) {
            self.set(id, Stage::Settled(Fate::Stays));
            self.actions.push_back(Action::Return(id));
            if self.phase == Phase::Ending {
                self.actions.push_back(Action::Unlock(id, id));
            }
        }
    }

    /// The time of the window is over: connections that have not left stay. Answers about the others still count, and everybody else
    /// goes on. Nothing more is begun.
    fn late(&mut self) {
        self.late = true;
        match self.phase {
            Phase::Greeting | Phase::Ending => self.cut(false),
            Phase::Over => {}
            Phase::Moving => {
                // Decisions that have not been carried out are dropped.
                self.actions.retain(|action| {
                    !matches!(
                        action,
                        Action::Lock(..) | Action::Offer(_) | Action::Divert | Action::Commit(_)
                    )
                });
                for id in self.ids().filter(|id| self.stage(*id) == Some(Stage::Here)).collect::<Vec<_>>() {
                    self.set(id, Stage::Settled(Fate::Stays));
                }
                self.keep(&[Stage::Offered, Stage::Ready, Stage::Leaving]);
                if self.any(Stage::Left) {
                    self.unlock();
                    self.finish(Phase::Ending);
                }
            }
        }
    }

    /// Connections at one of these stages stay, and the target is told.
    fn keep(&mut self, stages: &[Stage]) {
        for id in self.ids() {
            if self.stage(id).is_some_and(|stage| stages.contains(&stage)) {
                self.set(id, Stage::Settled(Fate::Stays));
                self.actions.push_back(Action::Abort(id));
            }
        }
    }

    /// Nothing can be said or heard any more.
    fn cut(&mut self, proven: bool) {
        if self.phase == Phase::Over {
            return;
        }
        // Connections still come back, and locks are still released.
        self.actions.retain(|action| matches!(action, Action::Return(_) | Action::Unlock(..)));
        if proven {
            self.ids().for_each(|id| self.come_back(id));
        }
        if self.phase == Phase::Moving {
            self.unlock();
        }
        self.over();
    }

    /// Settles everything that is still open: nothing more will be heard.
    fn over(&mut self) {
        for stage in &mut self.stages[self.window.clone()] {
            *stage = match *stage {
                Stage::Settled(fate) => Stage::Settled(fate),
                Stage::Left => Stage::Settled(Fate::Unknown),
                _ => Stage::Settled(Fate::Stays),
            };
        }
        self.give_up_rest();
        self.phase = Phase::Over;
    }

    /// Begins the next step where this one is complete.
    fn go_on(&mut self) {
        let is_open = [Stage::Here, Stage::Offered, Stage::Leaving].into_iter().any(|stage| self.any(stage));
        if self.phase != Phase::Moving || is_open {
            return;
        }
        if self.any(Stage::Ready) {
            for id in self.ids().filter(|id| self.stage(*id) == Some(Stage::Ready)).collect::<Vec<_>>() {
                self.set(id, Stage::Leaving);
            }
            self.actions.push_back(Action::Divert);
        } else if !self.any(Stage::Left) {
            self.unlock();
            self.begin_window();
        }
    }

    fn begin_window(&mut self) {
        let (start, count) = (self.window.end, self.stages.len());
        if self.late || start == count {
            self.window = start..start;
            return self.finish(if self.late { Phase::Over } else { Phase::Ending });
        }
        self.window = start..count.min(start + self.most);
        self.actions.push_back(Action::Lock(start as Id + 1, self.window.end as Id));
    }

    fn finish(&mut self, phase: Phase) {
        self.give_up_rest();
        self.actions.push_back(Action::Finish);
        self.phase = phase;
    }

    fn unlock(&mut self) {
        if !self.window.is_empty() {
            self.actions.push_back(Action::Unlock(self.window.start as Id + 1, self.window.end as Id));
        }
    }

    /// Has the connections stay for which no window has begun.
    fn give_up_rest(&mut self) {
        let rest = &mut self.stages[self.window.end..];
        rest.fill(Stage::Settled(Fate::Stays));
    }

    /// The connections of the window.
    fn ids(&self) -> Range<Id> {
        self.window.start as Id + 1..self.window.end as Id + 1
    }

    fn any(&self, wanted: Stage) -> bool {
        self.stages[self.window.clone()].contains(&wanted)
    }

    fn stage(&self, id: Id) -> Option<Stage> {
        self.stages.get((id as usize).checked_sub(1)?).copied()
    }

    fn set(&mut self, id: Id, stage: Stage) {
        self.stages[id as usize - 1] = stage;
    }
}
