//! Source and target led through every order of words, cuts, kills, damaged and exchanged records: at no point do two ends have
//! a connection, and none has it only where the source says so or is dead.

mod world;

use std::collections::HashSet;

use proptest::prelude::*;
use soccr_handover::protocol::{Action, Answer, Deed, Event, Fate, News, Source, Target};
use world::World;

/// Any number below `length`, from a list that may be at its end.
fn chooser(choices: Vec<u16>) -> impl FnMut(usize) -> usize {
    let mut choices = choices.into_iter();
    move |length| choices.next().map_or(0, |choice| usize::from(choice) % length)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_have_two_ends_a_connection_and_never_none_unsaid(
        count in 0..5usize,
        window in 1..4usize,
        same_network in any::<bool>(),
        faults in 0..4u8,
        choices in proptest::collection::vec(any::<u16>(), 0..80),
    ) {
        World::new(count, window, same_network, faults).run(chooser(choices));
    }

}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn where_nothing_goes_wrong_everything_moves(
        count in 0..5usize,
        window in 1..4usize,
        choices in proptest::collection::vec(any::<u16>(), 0..80),
    ) {
        let mut world = World::new(count, window, true, 0);
        world.run(chooser(choices));
        prop_assert!(world.places.iter().all(|place| place.alive));
    }
}

/// Every schedule of one connection with four faults, of two with three, of three with one: each state is visited once.
#[test]
fn every_schedule_of_few_connections() {
    for (count, faults, least) in [(1, 4, 1000), (2, 3, 100_000), (3, 1, 1000)] {
        let mut seen = HashSet::new();
        let mut open = vec![World::new(count, 2, true, faults)];
        while let Some(world) = open.pop() {
            if !seen.insert(world.clone()) {
                continue;
            }
            world.check();
            let steps = world.steps();
            if world.is_at_rest() {
                world.check_end();
            } else if steps.is_empty() {
                let mut waited = world.clone();
                waited.wait();
                open.push(waited);
            }
            for step in steps {
                let mut next = world.clone();
                next.take(step);
                open.push(next);
            }
        }
        assert!(seen.len() > least, "{} states of {count} connections are too few to be all", seen.len());
    }
}

/// Two connections, offered to a target that says nothing more.
fn offered() -> Source {
    let mut source = Source::new(2, 2);
    source.handle(Event::Hello).unwrap();
    assert_eq!(source.action(), Some(Action::Lock(1, 2)));
    source.handle(Event::Locked).unwrap();
    for id in [1, 2] {
        assert_eq!(source.action(), Some(Action::Offer(id)));
        source.handle(Event::Offered(id, true)).unwrap();
    }
    source
}

fn actions(source: &mut Source) -> Vec<Action> {
    std::iter::from_fn(|| source.action()).collect()
}

/// A second limit would be waited for in vain.
#[test]
fn nobody_waits_for_a_late_target_that_has_nothing() {
    let mut source = offered();
    source.handle(Event::Late).unwrap();
    let last = [Action::Abort(1), Action::Abort(2), Action::Unlock(1, 2), Action::Finish];
    assert_eq!(actions(&mut source), last);
    assert!(source.is_over());
}

/// It is still to say whether it has taken what was let go of. Everybody else goes on meanwhile.
#[test]
fn a_late_target_is_heard_about_what_has_left() {
    let mut source = offered();
    source.handle(Event::Heard(1, Answer::Ready)).unwrap();
    source.handle(Event::Heard(2, Answer::Ready)).unwrap();
    assert_eq!(source.action(), Some(Action::Divert));
    source.handle(Event::Diverted(true)).unwrap();
    assert_eq!(source.action(), Some(Action::Commit(1)));
    source.handle(Event::Committed(1, true)).unwrap();
    source.handle(Event::Late).unwrap();
    assert_eq!(actions(&mut source), [Action::Abort(2), Action::Unlock(1, 2), Action::Finish]);
    assert!(!source.is_over());
    source.handle(Event::Heard(1, Answer::Taken)).unwrap();
    source.handle(Event::End).unwrap();
    assert!(source.is_over());
    assert_eq!([1, 2].map(|id| source.fate(id)), [Some(Fate::Moved), Some(Fate::Stays)]);
}

/// Its state was: then it is passed over when it comes, and all others come in.
#[test]
fn what_follows_a_damaged_record_is_passed_over() {
    let mut target = Target::new();
    for news in [News::Begin(2), News::Bad(1), News::Offer(1), News::Commit(1), News::Offer(2)] {
        target.handle(news).unwrap();
    }
    let deeds: Vec<Deed> = std::iter::from_fn(|| target.deed()).collect();
    assert_eq!(deeds, [Deed::Refuse(1), Deed::Place(2)]);
    assert!(target.handle(News::Offer(1)).is_err(), "a number is used once");
}
