//! Source, target and everything between them, led step by step.

use std::collections::VecDeque;

use soccr_handover::protocol::{Action, Answer, Deed, Event, Fate, Id, News, Source, Target};

/// What the source says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Word {
    Begin(u32),
    Connection(Id),
    Commit(Id),
    Abort(Id),
    End,
    /// A record about this connection that was damaged on the way.
    Damaged(Id),
}

/// What the target says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reply {
    Hello,
    About(Id, Answer),
    End,
    Damaged,
}

/// Where one connection really is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Place {
    /// In its old socket.
    attached: bool,
    /// Its old socket is silent.
    locked: bool,
    /// The old host stays silent about it, or sends its packets on.
    diverted: bool,
    /// In a new socket that says nothing.
    silent: bool,
    /// In a new socket that lives.
    pub alive: bool,
    /// The target has heard the COMMIT.
    committed: bool,
    /// The target has let go of it, or could not have it.
    refused: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    source: Option<Source>,
    target: Option<Target>,
    pub places: Vec<Place>,
    /// Written by the source, and not passed on by it yet: cannot have been read.
    outbox: VecDeque<Word>,
    to_target: VecDeque<Word>,
    to_source: VecDeque<Reply>,
    /// Deeds of the target whose outcome is open.
    open: Vec<Deed>,
    /// The old socket is in the way of a new one until it is detached.
    same_network: bool,
    has_taken: bool,
    cut: bool,
    target_ended: bool,
    has_said_end: bool,
    /// How many things may still go wrong.
    faults: u8,
}

/// Everything that can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    SourceActs(bool),
    SourcePassesOn,
    SourceHears,
    SourceSeesCut,
    SourceIsLate,
    TargetActs,
    TargetFinishes(usize, bool),
    TargetHears,
    TargetSeesCut,
    TargetIsLate,
    TargetStops,
    Cut,
    KillSource,
    KillTarget,
    Damage(usize),
    Exchange(usize),
    DamageReply(usize),
    ExchangeReplies(usize),
}

impl World {
    pub fn new(count: usize, window: usize, same_network: bool, faults: u8) -> Self {
        let here = Place { attached: true, ..Place::default() };
        Self {
            source: Some(Source::new(count, window)),
            target: Some(Target::new()),
            places: vec![here; count],
            outbox: VecDeque::from([Word::Begin(count as u32)]),
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            open: Vec::new(),
            same_network,
            has_taken: false,
            cut: false,
            target_ended: false,
            has_said_end: false,
            faults,
        }
    }

    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let faulty = self.faults > 0;
        if let Some(source) = &self.source {
            let mut next = source.clone();
            if next.action().is_some() {
                // An action is done before anything else is heard.
                steps.push(Step::SourceActs(true));
                if faulty {
                    steps.push(Step::SourceActs(false));
                }
            } else if !source.is_over() && !self.to_source.is_empty() {
                steps.push(Step::SourceHears);
            }
            if faulty && !source.is_over() {
                steps.push(Step::SourceIsLate);
            }
            if (self.cut || self.target.is_none()) && !source.is_over() {
                steps.push(Step::SourceSeesCut);
            }
            if !self.outbox.is_empty() && !self.cut {
                steps.push(Step::SourcePassesOn);
            }
            if faulty {
                steps.push(Step::KillSource);
            }
        }
        if let Some(target) = &self.target {
            if target.clone().deed().is_some() {
                steps.push(Step::TargetActs);
            } else if !self.target_ended {
                if !self.to_target.is_empty() {
                    steps.push(Step::TargetHears);
                }
                if faulty && target.waiting() > 0 {
                    steps.push(Step::TargetIsLate);
                }
                if faulty {
                    steps.push(Step::TargetStops);
                }
            }
            if (self.cut || self.source.is_none()) && !self.target_ended {
                steps.push(Step::TargetSeesCut);
            }
            for number in 0..self.open.len() {
                steps.push(Step::TargetFinishes(number, true));
                if faulty {
                    steps.push(Step::TargetFinishes(number, false));
                }
            }
            if faulty {
                steps.push(Step::KillTarget);
            }
        }
        if faulty {
            if !self.cut {
                steps.push(Step::Cut);
            }
            steps.extend((0..self.to_target.len()).map(Step::Damage));
            steps.extend((1..self.to_target.len()).map(Step::Exchange));
            steps.extend((0..self.to_source.len()).map(Step::DamageReply));
            steps.extend((1..self.to_source.len()).map(Step::ExchangeReplies));
        }
        steps
    }

    pub fn take(&mut self, step: Step) {
        let fault = match step {
            Step::SourceActs(well) | Step::TargetFinishes(_, well) => !well,
            Step::SourcePassesOn | Step::SourceHears | Step::SourceSeesCut => false,
            Step::TargetActs | Step::TargetHears | Step::TargetSeesCut => false,
            _ => true,
        };
        self.faults -= u8::from(fault);
        match step {
            Step::SourceActs(well) => self.source_acts(well),
            Step::SourcePassesOn => self.to_target.extend(self.outbox.pop_front()),
            Step::SourceHears => match self.to_source.pop_front().unwrap() {
                Reply::Hello => self.tell_source(Event::Hello),
                Reply::About(id, answer) => self.tell_source(Event::Heard(id, answer)),
                Reply::End => self.tell_source(Event::End),
                Reply::Damaged => self.source_gives_up(),
            },
            Step::SourceSeesCut => {
                // What was said before the cut may have come through, or not: both are other schedules.
                self.source_gives_up();
            }
            Step::SourceIsLate => self.tell_source(Event::Late),
            Step::TargetActs => self.target_acts(),
            Step::TargetFinishes(number, well) => self.target_finishes(number, well),
            Step::TargetHears => self.target_hears(),
            Step::TargetSeesCut => self.end_target(),
            Step::TargetIsLate => self.tell_target(News::Late),
            Step::TargetStops => self.stop_target(),
            Step::Cut => self.cut = true,
            Step::KillSource => self.source = None,
            Step::KillTarget => {
                self.target = None;
                self.open.clear();
                self.places.iter_mut().for_each(|place| place.silent = false);
            }
            Step::Damage(at) => {
                self.to_target[at] = match self.to_target[at] {
                    Word::Connection(id) | Word::Commit(id) | Word::Abort(id) => Word::Damaged(id),
                    // Of no connection: the stream is of no use from there on.
                    _ => {
                        self.to_target.truncate(at);
                        self.cut = true;
                        return;
                    }
                };
            }
            Step::Exchange(at) => self.to_target.swap(at - 1, at),
            Step::DamageReply(at) => self.to_source[at] = Reply::Damaged,
            Step::ExchangeReplies(at) => self.to_source.swap(at - 1, at),
        }
    }

    fn place(&mut self, id: Id) -> &mut Place {
        &mut self.places[id as usize - 1]
    }

    fn source_acts(&mut self, well: bool) {
        match self.source.as_mut().unwrap().action().unwrap() {
            Action::Lock(first, last) => {
                (first..=last).for_each(|id| self.place(id).locked = true);
                self.tell_source(Event::Locked);
            }
            Action::Offer(id) => {
                assert!(self.place(id).locked && self.place(id).attached);
                if well {
                    self.outbox.push_back(Word::Connection(id));
                }
                self.tell_source(Event::Offered(id, well));
            }
            Action::Divert => {
                let leaving: Vec<Id> = self.source.as_ref().unwrap().leaving().collect();
                // Where it fails, it may have succeeded for some.
                let done = if well { leaving.len() } else { 1 };
                leaving.into_iter().take(done).for_each(|id| self.place(id).diverted = true);
                self.tell_source(Event::Diverted(well));
            }
            Action::Commit(id) => {
                assert!(self.place(id).diverted && self.place(id).locked);
                if well {
                    self.place(id).attached = false;
                    self.outbox.push_back(Word::Commit(id));
                }
                self.tell_source(Event::Committed(id, well));
            }
            Action::Abort(id) => self.outbox.push_back(Word::Abort(id)),
            Action::Return(id) => {
                let place = self.place(id);
                assert!(!place.attached, "it is there already");
                place.attached = true;
            }
            Action::Unlock(first, last) => {
                for id in first..=last {
                    let stays = self.source.as_ref().unwrap().fate(id) == Some(Fate::Stays);
                    let place = self.place(id);
                    place.diverted &= !stays;
                    assert!(!place.attached || stays, "what is not settled stays locked");
                    place.locked = false;
                }
            }
            Action::Finish => self.outbox.push_back(Word::End),
            other => panic!("{other:?}"),
        }
    }

    fn tell_source(&mut self, event: Event) {
        let source = self.source.as_mut().unwrap();
        if source.handle(event).is_err() {
            self.source_gives_up();
        }
    }

    fn source_gives_up(&mut self) {
        self.cut = true;
        let unread: Vec<Word> = self.outbox.drain(..).collect();
        // Of a target that is dead, the kernel tells.
        let proven = self.target.is_none() && !self.has_taken;
        let source = self.source.as_mut().unwrap();
        for word in unread {
            if let Word::Commit(id) = word {
                source.handle(Event::Unread(id)).unwrap();
            }
        }
        source.handle(Event::Cut { proven }).unwrap();
    }

    fn target_hears(&mut self) {
        let news = match self.to_target.pop_front().unwrap() {
            Word::Begin(count) => {
                self.to_source.push_back(Reply::Hello);
                News::Begin(count)
            }
            Word::Connection(id) => News::Offer(id),
            Word::Commit(id) => {
                self.place(id).committed = true;
                News::Commit(id)
            }
            Word::Abort(id) => News::Abort(id),
            Word::Damaged(id) => News::Bad(id),
            Word::End => return self.end_target(),
        };
        self.tell_target(news);
    }

    fn tell_target(&mut self, news: News) {
        if self.target.as_mut().unwrap().handle(news).is_err() {
            self.stop_target();
        }
        self.answer_end();
    }

    /// It takes nothing more, and says so of what waits.
    fn stop_target(&mut self) {
        self.target.as_mut().unwrap().handle(News::Late).unwrap();
        self.end_target();
    }

    fn end_target(&mut self) {
        self.target_ended = true;
        self.to_target.clear();
        self.target.as_mut().unwrap().handle(News::End).unwrap();
        self.answer_end();
    }

    /// The target says END when it has brought everything to rest.
    fn answer_end(&mut self) {
        let target = self.target.as_ref().unwrap();
        if (target.is_over() || target.is_settled()) && !std::mem::replace(&mut self.has_said_end, true) {
            self.to_source.push_back(Reply::End);
        }
    }

    fn target_acts(&mut self) {
        match self.target.as_mut().unwrap().deed().unwrap() {
            Deed::Ready(id) => self.to_source.push_back(Reply::About(id, Answer::Ready)),
            Deed::Refuse(id) => {
                assert!(!self.place(id).silent && !self.place(id).alive, "refused, and not let go of");
                self.to_source.push_back(Reply::About(id, Answer::Refused));
            }
            Deed::Forget(id) => {
                let place = self.place(id);
                (place.silent, place.refused) = (false, true);
            }
            later @ (Deed::Place(_) | Deed::Take(_)) => self.open.push(later),
            other => panic!("{other:?}"),
        }
        self.answer_end();
    }

    fn target_finishes(&mut self, number: usize, well: bool) {
        match self.open.remove(number) {
            Deed::Place(id) => {
                let place = self.place(id);
                (place.silent, place.refused) = (well, !well);
                self.tell_target(News::Placed(id, well));
            }
            Deed::Take(id) => {
                // One that is in its socket already cannot fail to get there.
                let well = well || !self.same_network;
                let place = self.place(id);
                assert!(place.silent && place.committed);
                (place.silent, place.alive, place.refused) = (false, well, !well);
                if well {
                    self.has_taken = true;
                    self.to_source.push_back(Reply::About(id, Answer::Taken));
                }
                self.tell_target(News::Taken(id, well));
            }
            other => panic!("{other:?}"),
        }
        self.answer_end();
    }

    /// What holds at any time.
    pub fn check(&self) {
        for place in &self.places {
            assert!(!(place.attached && place.alive), "two ends have it");
            assert!(!place.alive || place.committed, "it was not the target's");
        }
    }

    /// What holds in the end, when nothing more can happen.
    pub fn check_end(&self) {
        for (place, id) in self.places.iter().zip(1..) {
            let nobody = !place.attached && !place.alive;
            match &self.source {
                Some(source) => {
                    assert!(!place.locked, "it is still silent");
                    assert_eq!(place.diverted, !place.attached, "of those that have left, and of no others");
                    match source.fate(id).expect("everything is settled") {
                        Fate::Moved => assert!(place.alive),
                        Fate::Stays => assert!(place.attached),
                        Fate::Unknown => assert!(!place.attached),
                    }
                }
                // It has died with the value in its memory; what it has let go of, the target has, if that can and lives.
                None => assert!(!nobody || !place.committed || place.refused || self.target.is_none()),
            }
            assert!(self.target.is_none() || !place.silent, "a socket is left silent");
        }
        if let Some(target) = &self.target {
            assert!(target.is_over() || !self.target_ended);
        }
    }

    /// Something always remains to be done until all is at rest; a target that hears nothing more sees the end of the channel.
    pub fn is_at_rest(&self) -> bool {
        let source = self.source.as_ref().is_none_or(Source::is_over);
        let target = self.target.as_ref().is_none_or(|target| self.target_ended && target.is_over());
        source && target && self.open.is_empty()
    }

    /// Where nothing can happen, time passes: a source that is over closes its end; one that waits in vain has a clock.
    pub fn wait(&mut self) {
        let before = self.clone();
        match &self.source {
            Some(source) if !source.is_over() => self.tell_source(Event::Late),
            _ => self.cut = true,
        }
        assert!(*self != before, "it waits for ever: {before:?}");
    }

    /// Goes on until nothing can happen.
    pub fn run(&mut self, mut choose: impl FnMut(usize) -> usize) {
        loop {
            self.check();
            let steps = self.steps();
            if self.is_at_rest() {
                return self.check_end();
            }
            if steps.is_empty() {
                self.wait();
                continue;
            }
            let step = steps[choose(steps.len())];
            self.take(step);
        }
    }
}
