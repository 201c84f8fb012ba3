//! The target: it brings those connections to life that the source has let go of, and no others.

use std::collections::{BTreeMap, VecDeque};

use super::{Id, Violation};

/// What happens to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum News {
    /// BEGIN: the number of connections that are to come.
    Begin(u32),
    /// CONNECTION.
    Offer(Id),
    /// A record about this connection cannot be understood.
    Bad(Id),
    /// COMMIT.
    Commit(Id),
    /// ABORT.
    Abort(Id),
    /// The outcome of [`Deed::Place`].
    Placed(Id, bool),
    /// The outcome of [`Deed::Take`].
    Taken(Id, bool),
    /// The source has not decided in time about connections that are ready, or nothing more is taken.
    Late,
    /// The source has said its last word, or is gone.
    End,
}

/// What a target is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Deed {
    /// Lock the connection and put it into a silent socket; or, where its old socket is in the way, check that it could be.
    Place(Id),
    /// Say READY.
    Ready(Id),
    /// Say REFUSED. No later word about the connection counts.
    Refuse(Id),
    /// Say TAKEN, and then bring it to life. If it has no socket yet, restore it first.
    Take(Id),
    /// Close its socket silently.
    Forget(Id),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Arriving,
    /// READY is said.
    Waiting,
    /// COMMIT is heard.
    Raising,
    Taken,
    /// Damaged, or given up by the source, while it is being placed.
    Unwanted,
    /// Refused, since a record before it could not be understood: it may come still.
    Damaged,
    Over,
}

impl Stage {
    /// Something is still to happen.
    fn is_open(self) -> bool {
        !matches!(self, Self::Taken | Self::Damaged | Self::Over)
    }
}

/// The machine of the target. See the [module](super).
///
/// [`Place`](Deed::Place) and [`Take`](Deed::Take) may be done for many at once, and later: other news may come before their
/// outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Target {
    has_begun: bool,
    announced: u32,
    stages: BTreeMap<Id, Stage>,
    /// How many are not settled. And how many of them wait for the source.
    open: usize,
    waiting: usize,
    deeds: VecDeque<Deed>,
    ended: bool,
}

impl Target {
    /// A target that has heard nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next thing to do.
    pub fn deed(&mut self) -> Option<Deed> {
        self.deeds.pop_front()
    }

    /// The source has nothing more to say, and everything it has let go of is settled.
    pub fn is_over(&self) -> bool {
        self.ended && self.deeds.is_empty() && !self.is_open()
    }

    /// All connections that are announced have come and are settled: the target has nothing more to say.
    pub fn is_settled(&self) -> bool {
        self.has_begun && self.announced() == 0 && self.deeds.is_empty() && !self.is_open()
    }

    fn is_open(&self) -> bool {
        self.open > 0
    }

    /// How many connections are still to come, as the source has said.
    pub fn announced(&self) -> u32 {
        self.announced - self.stages.len() as u32
    }

    /// How many are ready, and wait for the source.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// The connection waits for the source: what was held for it counts.
    pub fn waits(&self, id: Id) -> bool {
        self.stages.get(&id) == Some(&Stage::Waiting)
    }

    /// The connection is to be placed.
    pub fn places(&self, id: Id) -> bool {
        self.stages.get(&id) == Some(&Stage::Arriving)
    }

    /// Takes in what has happened.
    ///
    /// # Errors
    /// The source breaks the protocol: nothing more that it says counts. [`News::End`] has to follow.
    pub fn handle(&mut self, news: News) -> Result<(), Violation> {
        match news {
            News::Begin(count) if !self.has_begun => (self.has_begun, self.announced) = (true, count),
            News::Begin(_) => return Err(Violation("the source begins twice")),
            News::Offer(id) if self.stages.get(&id) == Some(&Stage::Damaged) => self.set(id, Stage::Over),
            News::Offer(id) => {
                self.appear(id, Stage::Arriving)?;
                self.deeds.push_back(Deed::Place(id));
            }
            News::Bad(id) => return self.bad(id),
            News::Placed(id, is_placed) => match (self.stages.get(&id), is_placed) {
                (Some(Stage::Arriving), true) if self.ended => self.forget(id),
                (Some(Stage::Arriving), true) => {
                    self.set(id, Stage::Waiting);
                    self.deeds.push_back(Deed::Ready(id));
                }
                (Some(Stage::Unwanted), true) => {
                    self.forget(id);
                    self.refuse(id);
                }
                (Some(Stage::Arriving | Stage::Unwanted), false) => self.refuse(id),
                _ => return Err(Violation("nothing was to be placed")),
            },
            News::Commit(id) => match self.stages.get(&id) {
                Some(Stage::Waiting) => {
                    self.set(id, Stage::Raising);
                    self.deeds.push_back(Deed::Take(id));
                }
                // Our REFUSED has crossed with it.
                Some(Stage::Unwanted | Stage::Damaged | Stage::Over) => {}
                _ => return Err(Violation("the source lets go of what was not ready")),
            },
            News::Abort(id) => match self.stages.get(&id) {
                Some(Stage::Arriving) => self.set(id, Stage::Unwanted),
                Some(Stage::Waiting) => self.forget(id),
                Some(Stage::Unwanted | Stage::Damaged | Stage::Over) => {}
                _ => return Err(Violation("the source keeps what it has let go of")),
            },
            News::Taken(id, true) => self.set(id, Stage::Taken),
            News::Taken(id, false) => self.refuse(id),
            News::Late => {
                for id in self.all(Stage::Waiting) {
                    self.forget(id);
                    self.refuse(id);
                }
            }
            News::End => {
                self.ended = true;
                self.all(Stage::Waiting).into_iter().for_each(|id| self.forget(id));
            }
        }
        Ok(())
    }

    fn bad(&mut self, id: Id) -> Result<(), Violation> {
        match self.stages.get(&id) {
            None => {
                self.appear(id, Stage::Damaged)?;
                self.deeds.push_back(Deed::Refuse(id));
            }
            Some(Stage::Arriving) => self.set(id, Stage::Unwanted),
            Some(Stage::Waiting) => {
                // In this order: the source may go on with the connection as soon as it hears the answer.
                self.forget(id);
                self.refuse(id);
            }
            Some(Stage::Unwanted | Stage::Damaged | Stage::Over) => {}
            Some(Stage::Raising | Stage::Taken) => return Err(Violation("a damaged record behind a COMMIT")),
        }
        Ok(())
    }

    /// A number must be new, and announced.
    fn appear(&mut self, id: Id, stage: Stage) -> Result<(), Violation> {
        if self.ended || self.announced() == 0 || self.stages.contains_key(&id) {
            return Err(Violation("the source uses a number twice, or more of them than it has announced"));
        }
        self.set(id, stage);
        Ok(())
    }

    fn set(&mut self, id: Id, stage: Stage) {
        if let Some(before) = self.stages.insert(id, stage) {
            self.open -= usize::from(before.is_open());
            self.waiting -= usize::from(before == Stage::Waiting);
        }
        self.open += usize::from(stage.is_open());
        self.waiting += usize::from(stage == Stage::Waiting);
    }

    fn forget(&mut self, id: Id) {
        self.set(id, Stage::Over);
        self.deeds.push_back(Deed::Forget(id));
    }

    fn refuse(&mut self, id: Id) {
        self.set(id, Stage::Over);
        self.deeds.push_back(Deed::Refuse(id));
    }

    fn all(&self, wanted: Stage) -> Vec<Id> {
        self.stages.iter().filter(|(_, stage)| **stage == wanted).map(|(id, _)| *id).collect()
    }
}
