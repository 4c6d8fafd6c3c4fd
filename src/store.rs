//! What is asked for and what is known of it; when Sysdig is asked next, and for what. Neither waits nor does I/O.

use crate::prelude::*;
use crate::{definitions::Definition, random, readings::Item, sysdig::STEP};

const FORGOTTEN: Duration = Duration::from_secs(300);
const MOST_ASKS: usize = 12_000;
/// With more questions than this, those that were asked once make room.
const MOST_QUESTIONS: usize = 1_000;
/// Sysdig locks an account out for so long. Source: <https://docs.sysdig.com/en/docs/developer-tools/working-with-the-data-api/>.
const LOCKOUT: Duration = Duration::from_secs(15);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// As many failures in a row close the way to Sysdig; then one query at a time tries it.
const FAILURES: u32 = 3;
/// What becomes due meanwhile is this late at the most.
const NAP: Duration = Duration::from_millis(500);

/// What Sysdig is asked, about which objects, and what is done with a value before it is served.
pub(crate) type Plan = (Question, Select, &'static Definition);
pub(crate) type Job = (Question, Vec<Select>);
/// An answer for each of the selections, or why there is none for all of them.
pub(crate) type Outcome = Result<Vec<Result<Vec<Item>>>>;

pub(crate) struct Store {
    config: Config,
    batches: BTreeMap<Question, Batch>,
    failures: u32,
    /// Until when Sysdig is not asked, and why.
    closed: Option<(Instant, Error)>,
}

/// What one query answers, when it is due (at once before the first time), and how many queries it takes.
#[derive(Default)]
struct Batch {
    asks: BTreeMap<Select, Ask>,
    due: Option<Instant>,
    running: bool,
    failures: u32,
    cost: u64,
}

#[derive(Default)]
struct Ask {
    last: Option<Instant>,
    /// Asked for more than once: kept fresh, if anything is.
    again: bool,
    waiting: bool,
    answered: Option<Instant>,
    /// The last good values, and why there are none, since and at the last attempt (Unix seconds).
    items: Vec<Item>,
    error: Option<(Error, u64, u64)>,
}

impl Store {
    pub(crate) fn new(config: &Config) -> Self {
        Self { config: config.clone(), batches: BTreeMap::new(), failures: 0, closed: None }
    }

    /// What is known without asking Sysdig; None if it must be asked.
    pub(crate) fn known(&mut self, plan @ (question, select, _): &Plan, at: Instant, now: u64) -> Option<Result<Vec<Item>>> {
        let ask = self.batches.get_mut(question)?.asks.get_mut(select)?;
        let fresh = at - ask.answered? < self.config.refresh_interval * 2 || ask.again;
        fresh.then(|| {
            (ask.last, ask.again) = (Some(at), true);
            ask.outcome(plan, self.config.max_age.as_secs(), now)
        })
    }

    /// Notes that somebody waits for an answer. Returns when there was one. Errors: there is no room.
    pub(crate) fn want(&mut self, (question, select, _): &Plan, at: Instant) -> Result<Option<Instant>> {
        let (questions, readings) = self.sizes();
        if questions >= MOST_QUESTIONS || readings >= MOST_ASKS {
            self.forget(at, |ask| !ask.again);
        }
        ensure!(self.sizes().1 < MOST_ASKS, Overloaded, "more metrics are asked for than the adapter keeps ({MOST_ASKS})");
        let ask = self.batches.entry(question.clone()).or_default().asks.entry(select.clone()).or_default();
        ask.again |= ask.last.is_some() && !self.config.refresh_interval.is_zero();
        (ask.last, ask.waiting) = (Some(at), true);
        Ok(ask.answered)
    }

    /// How many questions there are, and how many readings they answer.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.batches.len(), self.batches.values().map(|batch| batch.asks.len()).sum())
    }

    /// What somebody waited for since there was an answer `before`, or why Sysdig is not asked just now.
    pub(crate) fn answer(&self, plan: &Plan, before: Option<Instant>, at: Instant, now: u64) -> Option<Result<Vec<Item>>> {
        let (question, select, _) = plan;
        let ask = self.batches.get(question).and_then(|batch| batch.asks.get(select));
        if let Some(ask) = ask.filter(|ask| ask.answered != before) {
            return Some(ask.outcome(plan, self.config.max_age.as_secs(), now));
        }
        let (until, error) = self.closed.as_ref()?;
        let left = until.checked_duration_since(at)?.as_secs() + 1;
        let message = format!("{}; it is asked again in {left} s", error.message);
        Some(Err(Error { reason: error.reason, message, retry_after: Some(left) }))
    }

    /// What Sysdig is asked next, what somebody waits for first. Errors: for how long there is nothing to ask.
    pub(crate) fn next(&mut self, at: Instant) -> Result<Job, Duration> {
        let pause = self.closed.as_ref().map_or(Duration::ZERO, |(until, _)| until.saturating_duration_since(at));
        if !pause.is_zero() || (self.failures >= FAILURES && self.batches.values().any(|batch| batch.running)) {
            return Err(pause.max(NAP));
        }
        let wanted = |ask: &Ask| ask.waiting || ask.again;
        let rank = |batch: &Batch| (!batch.asks.values().any(|ask| ask.waiting), batch.due);
        let idle = self.batches.iter_mut().filter(|(_, batch)| !batch.running && batch.asks.values().any(wanted));
        let Some((question, batch)) = idle.min_by_key(|(_, batch)| rank(batch)) else { return Err(NAP) };
        let early = batch.due.filter(|due| rank(batch).0 && *due > at);
        early.map_or(Ok(()), |due| Err(NAP.min(due - at)))?;
        batch.running = true;
        let selects = batch.asks.iter().filter(|(_, ask)| wanted(ask)).map(|(select, _)| select.clone());
        Ok((question.clone(), selects.collect()))
    }

    /// Takes in what an attempt that began at `now` to answer `selects` came to by `at`, and how many queries it took.
    pub(crate) fn done(&mut self, (question, selects): &Job, outcome: Outcome, cost: u64, at: Instant, now: u64) {
        // What is everybody's closes the way to Sysdig for all: a limit of the rate at once, other failures when they repeat.
        let of_sysdig = |reason: Reason| reason.word().starts_with("backend-") && reason != Reason::BackendRejected;
        let everybodys = outcome.as_ref().err().filter(|error| of_sysdig(error.reason));
        if cost > 0 {
            self.failures = everybodys.map_or(0, |_| self.failures + 1);
            self.closed = everybodys.and_then(|error| {
                let asked = error.retry_after.map_or(LOCKOUT, Duration::from_secs).min(LONGEST_PAUSE);
                let backoff = self.config.refresh_interval * self.failures.saturating_sub(FAILURES - 1).min(3);
                let pause = if error.reason == Reason::BackendRateLimited { asked } else { backoff };
                (!pause.is_zero()).then(|| (at + pause.mul_f64(1.0 + random() / 4.0), error.clone()))
            });
        }
        // All share the budget, without the fifth that is left to first asks.
        let total: u64 = self.batches.values().map(|batch| batch.cost).sum();
        let interval = self.config.refresh_interval.max(Duration::from_millis(75_000 * total / self.config.max_queries.max(1)));
        let Some(batch) = self.batches.get_mut(question) else { return };
        batch.failures = if outcome.is_err() && everybodys.is_none() { batch.failures + 1 } else { 0 };
        batch.due = Some(at + interval * 2_u32.pow(batch.failures.saturating_sub(1).min(3)));
        (batch.running, batch.cost) = (false, cost);
        let answers = outcome.unwrap_or_else(|error| vec![Err(error); selects.len()]);
        for (select, answer) in selects.iter().zip(answers) {
            if let Some(ask) = batch.asks.get_mut(select) {
                ask.take(answer, self.config.refresh_interval.is_zero(), at, now);
            }
        }
        self.forget(at, |_| false);
    }

    fn forget(&mut self, at: Instant, more: impl Fn(&Ask) -> bool) {
        let old = |ask: &Ask| ask.last.is_some_and(|last| at - last > FORGOTTEN);
        self.batches.retain(|_, batch| {
            batch.asks.retain(|_, ask| ask.waiting || !(old(ask) || more(ask)));
            batch.running || !batch.asks.is_empty()
        });
    }
}

impl Ask {
    fn take(&mut self, answer: Result<Vec<Item>>, forgetful: bool, at: Instant, now: u64) {
        (self.answered, self.waiting) = (Some(at), false);
        match answer {
            Ok(items) => (self.items, self.error) = (items, None),
            Err(error) => {
                self.items.retain(|_| !forgetful && error.reason.is_passing());
                self.error = Some((error, self.error.take().map_or(now, |(_, since, _)| since), now));
            }
        }
    }

    /// The values that are not too old, or why there are none.
    fn outcome(&self, (question, select, defined): &Plan, max_age: u64, now: u64) -> Result<Vec<Item>> {
        let age = |item: &Item| now.saturating_sub(item.2);
        // Of all objects that labels name, some may be gone.
        let (hold, zero) = if select.name == "*" { (0, false) } else { defined.absence };
        let max_age = if defined.max_age > 0 { defined.max_age } else { max_age };
        let most = max_age.max(hold);
        let shown = |it: &Item| (it.0.clone(), it.1.scaled(defined.divide_by, defined.decimals), it.2);
        let good: Vec<Item> = self.items.iter().filter(|item| age(item) <= most).map(shown).collect();
        if !good.is_empty() {
            return Ok(good);
        }
        let newest = self.items.iter().map(age).min();
        let Some((error, since, last)) = &self.error else {
            let (metric, age) = (&question.metric, newest.unwrap_or_default());
            let object = named(select.resource, &select.namespace, &select.name);
            let name = if defined.name.is_empty() { "MAX_AGE" } else { "what its definition allows" };
            return Err(refusal!(TooOld, "the newest sample of {metric} for {object} is {age} s old, over {name} ({most} s)"));
        };
        if zero && error.reason == Reason::NoData && now.saturating_sub(*last) + STEP <= max_age {
            return Ok(vec![(select.name.clone(), Quantity::ZERO, last.saturating_sub(STEP))]);
        }
        let Some(age) = newest else { return Err(error.clone()) };
        Err(Error::new(error.reason, format!("{} (since {}; the last value is {age} s old)", error.message, rfc3339(*since))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantity::Quantity;
    use crate::route::Resource;
    use crate::selector::Tuning;

    const NOW: u64 = 1_562_514_927;
    const SECOND: Duration = Duration::from_secs(1);

    fn store(variables: &[(&str, &str)]) -> Store {
        let value = |name: &str| variables.iter().find(|(it, _)| *it == name).map(|(_, text)| Ok((*text).to_owned()));
        Store::new(&Config::read(value).unwrap())
    }

    fn plan(metric: &str, name: &str) -> Plan {
        let resource = &Resource::SERVICES;
        let (metric, tuning, legacy, labels) = (metric.to_owned(), Tuning::DEFAULT, false, Vec::new());
        let question = Question { metric, tuning, resource, legacy, labels };
        let [namespace, name, labels] = ["default", name, ""].map(str::to_owned);
        (question, Select { resource, namespace, name, labels }, forever(Definition::default()))
    }

    fn good(end: u64) -> Outcome {
        Ok(vec![Ok(vec![("kuard".to_owned(), Quantity::ZERO, end)])])
    }

    fn bad(reason: Reason, retry_after: Option<u64>) -> Outcome {
        Err(Error { retry_after, ..Error::new(reason, "it fails".to_owned()) })
    }

    /// Asks for a reading, which is answered with one query.
    fn ask(store: &mut Store, metric: &str, at: Instant, outcome: Outcome) {
        store.want(&plan(metric, "kuard"), at).unwrap();
        answer(store, metric, at, outcome);
    }

    /// Expects that Sysdig is asked for this metric now, and answers.
    #[track_caller]
    fn answer(store: &mut Store, metric: &str, at: Instant, outcome: Outcome) {
        let job = store.next(at).unwrap();
        assert_eq!(job.0.metric, metric);
        store.done(&job, outcome, 1, at, NOW);
    }

    /// Why Sysdig is not asked, which is told who waits for anything.
    fn closed(store: &Store, at: Instant) -> Option<Error> {
        store.answer(&plan("nobody asked for", "kuard"), None, at, NOW).and_then(Result::err)
    }

    fn metric(job: Result<Job, Duration>) -> Option<String> {
        job.ok().map(|(question, _)| question.metric)
    }

    #[test]
    fn what_somebody_waits_for_comes_before_what_is_due_and_what_is_due_longest_before_the_rest() {
        let (mut store, at) = (store(&[]), Instant::now());
        for (name, after) in [("late", 2), ("early", 1)] {
            ask(&mut store, name, at + SECOND * after, good(NOW));
            assert!(store.known(&plan(name, "kuard"), at + SECOND * after, NOW).is_some());
        }
        let due = at + SECOND * 20;
        store.want(&plan("new", "kuard"), due).unwrap();
        let order: Vec<_> = (0..3).filter_map(|_| metric(store.next(due))).collect();
        assert_eq!(order, ["new", "early", "late"]);
        assert_eq!(store.next(due).unwrap_err(), NAP, "each is asked for once at a time");
    }

    #[test]
    fn a_reading_is_refreshed_each_interval_if_it_was_asked_for_again_and_forgotten_after_five_minutes() {
        let (mut store, at) = (store(&[]), Instant::now());
        ask(&mut store, "once", at, good(NOW));
        ask(&mut store, "again", at, good(NOW));
        assert!(store.known(&plan("again", "kuard"), at, NOW).is_some());
        for (after, due) in [(0, false), (9, false), (10, true), (20, true), (300, true)] {
            let at = at + SECOND * after;
            assert_eq!(metric(store.next(at)), due.then(|| "again".to_owned()), "after {after} s");
            if due {
                store.done(&(plan("again", "kuard").0, vec![plan("again", "kuard").1]), good(NOW), 1, at, NOW);
            }
        }
        let at = at + SECOND * 311;
        answer(&mut store, "again", at, good(NOW));
        assert!(store.known(&plan("again", "kuard"), at, NOW).is_none());
        assert!(store.batches.is_empty());
    }

    #[test]
    fn after_three_failures_of_everybodys_one_query_at_a_time_tries_until_one_works() {
        let (mut store, mut at) = (store(&[]), Instant::now());
        for name in ["a", "b", "c"] {
            assert!(closed(&store, at).is_none());
            ask(&mut store, name, at, bad(Reason::BackendError, None));
        }
        for intervals in [1, 2, 3, 3] {
            let error = closed(&store, at).unwrap();
            let left = error.retry_after.unwrap();
            assert!((10 * intervals..=10 * intervals + 10 * intervals / 4 + 1).contains(&left), "{left} s");
            assert_eq!(error.message, format!("it fails; it is asked again in {left} s"));
            assert!(store.next(at).is_err());
            at += SECOND * u32::try_from(left).unwrap();
            assert!(closed(&store, at).is_none());
            for name in ["d", "e"] {
                store.want(&plan(name, "kuard"), at).unwrap();
            }
            let job = store.next(at).unwrap();
            assert!(store.next(at).is_err(), "one at a time");
            store.done(&job, bad(Reason::BackendError, None), 1, at, NOW);
        }
        at += SECOND * 60;
        let job = store.next(at).unwrap();
        store.done(&job, good(NOW), 1, at, NOW);
        for name in ["f", "g"] {
            store.want(&plan(name, "kuard"), at).unwrap();
        }
        assert!(store.next(at).is_ok() && store.next(at).is_ok(), "all at once again");
    }

    #[test]
    fn a_limit_of_the_rate_is_waited_out_as_long_as_sysdig_says_whatever_the_interval() {
        for interval in ["0s", "10s"] {
            for (says, least) in [(None, 15), (Some(0), 0), (Some(4), 4), (Some(300), 300), (Some(86_400), 300)] {
                let (mut store, at) = (store(&[("REFRESH_INTERVAL", interval)]), Instant::now());
                ask(&mut store, "a", at, bad(Reason::BackendRateLimited, says));
                let left = closed(&store, at).and_then(|error| error.retry_after).unwrap_or_default();
                let most = if least == 0 { 0 } else { least + least / 4 + 1 };
                assert!((least..=most).contains(&left), "{interval} {says:?}: {left} s");
            }
        }
    }

    #[test]
    fn a_question_that_fails_for_a_reason_of_its_own_backs_off_alone() {
        let (mut store, at) = (store(&[]), Instant::now());
        for name in ["wrong", "right"] {
            ask(&mut store, name, at, good(NOW));
            assert!(store.known(&plan(name, "kuard"), at, NOW).is_some());
        }
        let (mut asked, step) = (BTreeMap::<String, Vec<u64>>::new(), SECOND * 10);
        for turn in 1..=32 {
            while let Ok(job) = store.next(at + step * turn) {
                let wrong = job.0.metric == "wrong";
                asked.entry(job.0.metric.clone()).or_default().push(turn.into());
                let outcome = if wrong { bad(Reason::BackendRejected, None) } else { good(NOW) };
                store.done(&job, outcome, 1, at + step * turn, NOW);
            }
            let _ = store.known(&plan("wrong", "kuard"), at + step * turn, NOW);
            let _ = store.known(&plan("right", "kuard"), at + step * turn, NOW);
        }
        assert_eq!(asked["right"], (1..=32).collect::<Vec<u64>>());
        assert_eq!(asked["wrong"], [1, 2, 4, 8, 16, 24, 32]);
    }

    #[test]
    fn the_interval_stretches_so_that_refreshes_take_four_fifths_of_the_budget() {
        for (most, cost, expected) in [("1000", 1, 10), ("60", 8, 10), ("60", 16, 20), ("10", 4, 30)] {
            let (mut store, at) = (store(&[("SDC_MAX_QUERIES_PER_MINUTE", most)]), Instant::now());
            store.want(&plan("a", "kuard"), at).unwrap();
            // The cost of a refresh counts from the next one on.
            for _ in 0..2 {
                let job = store.next(at).unwrap();
                store.done(&job, good(NOW), cost, at, NOW);
                store.want(&plan("a", "kuard"), at).unwrap();
            }
            let due = store.batches.values().next().unwrap().due.unwrap();
            assert_eq!((due - at).as_secs(), expected, "{cost} queries of {most} a minute");
        }
    }

    #[test]
    fn while_refreshes_fail_the_last_good_value_stands_in_until_it_is_too_old_and_the_refusal_says_since_when() {
        let table = [
            (bad(Reason::BackendError, None), 120, None),
            (bad(Reason::BackendError, None), 121, Some(Reason::BackendError)),
            (bad(Reason::ObjectNotFound, None), 0, Some(Reason::ObjectNotFound)),
            (good(NOW), 120, None),
            (good(NOW), 121, Some(Reason::TooOld)),
        ];
        for (outcome, age, expected) in table {
            let (mut store, at) = (store(&[]), Instant::now());
            ask(&mut store, "a", at, good(NOW));
            ask(&mut store, "a", at, outcome);
            match (store.known(&plan("a", "kuard"), at, NOW + age).unwrap(), expected) {
                (Ok(items), None) => assert_eq!(items[0].2, NOW),
                (Err(error), Some(reason)) => {
                    assert_eq!(error.reason, reason);
                    let since = error.message.contains("(since 2019-07-07T15:55:27Z; the last value is 121 s old)");
                    assert_eq!(since, reason == Reason::BackendError, "{}", error.message);
                }
                (found, _) => panic!("{expected:?} after {age} s: {found:?}"),
            }
        }
    }

    #[test]
    fn what_was_asked_for_once_makes_room_and_what_is_waited_for_does_not() {
        for answered in [true, false] {
            let (mut store, at) = (store(&[]), Instant::now());
            for index in 0..MOST_ASKS {
                store.want(&plan("a", &index.to_string()), at).unwrap();
            }
            if answered {
                let job = store.next(at).unwrap();
                let none = || Error::new(Reason::NoData, String::new());
                store.done(&job, Ok(job.1.iter().map(|_| Err(none())).collect()), 1, at, NOW);
            }
            let room = store.want(&plan("b", "kuard"), at);
            assert_eq!(room.map_err(|error| error.reason), if answered { Ok(None) } else { Err(Reason::Overloaded) });
        }
    }

    /// What is served at `now` for a definition with this age and absence, after `kuard` had a 0.001 with samples up to
    /// `NOW` and `error` at `failed`.
    fn served(definition: Definition, error: Reason, failed: u64, now: u64) -> Result<Vec<(String, u64)>, Reason> {
        let (mut ask, at) = (Ask::default(), Instant::now());
        let value = Quantity::parse("0.001").unwrap();
        ask.take(Ok(vec![("kuard".to_owned(), value, NOW)]), false, at, NOW);
        ask.take(Err(Error::new(error, "it fails".to_owned())), false, at, failed);
        let (question, select, _) = plan("m", "kuard");
        let plan = (question, select, forever(definition));
        let items = ask.outcome(&plan, 120, now).map_err(|error| error.reason)?;
        Ok(items.into_iter().map(|(_, value, end)| (value.to_string(), end)).collect())
    }

    #[test]
    fn what_is_served_for_silence_is_what_the_definition_says() {
        let silence = |absence| Definition { absence, ..Definition::default() };
        let (last, zero) = (Ok(vec![("1m".to_owned(), NOW)]), |end| Ok(vec![("0".to_owned(), end)]));
        let no_data = Reason::NoData;
        let table = [
            (silence((0, false)), no_data, 120, last.clone()),
            (silence((0, false)), no_data, 121, Err(no_data)),
            (silence((600, false)), no_data, 600, last.clone()),
            (silence((600, false)), no_data, 601, Err(no_data)),
            (silence((600, false)), Reason::BackendError, 600, last.clone()),
            (silence((600, false)), Reason::ObjectNotFound, 121, Err(Reason::ObjectNotFound)),
            (silence((0, true)), no_data, 120, last),
            (silence((0, true)), no_data, 200, zero(NOW + 190)),
            (silence((0, true)), Reason::PartlySeen, 200, Err(Reason::PartlySeen)),
            (silence((0, true)), Reason::MetricNotCollected, 200, Err(Reason::MetricNotCollected)),
            (silence((0, true)), Reason::BackendError, 200, Err(Reason::BackendError)),
            (Definition { max_age: 60, ..Definition::default() }, no_data, 61, Err(no_data)),
        ];
        for (definition, error, after, expected) in table {
            let what = format!("{definition:?} {error:?} {after}");
            assert_eq!(served(definition, error, NOW + after, NOW + after), expected, "{what}");
        }
        // An answer that is old stands in like none, and of many objects some may be gone.
        let held = |name: &str, now: u64| {
            let (mut ask, value) = (Ask::default(), Quantity::parse("0.001").unwrap());
            ask.take(Ok(vec![("kuard".to_owned(), value, NOW)]), false, Instant::now(), now);
            let (question, select, _) = plan("m", name);
            let plan = (question, select, forever(silence((600, false))));
            ask.outcome(&plan, 120, now).map(|items| items.len()).map_err(|error| error.reason)
        };
        assert_eq!([held("kuard", NOW + 600), held("*", NOW + 120)], [Ok(1), Ok(1)]);
        assert_eq!([held("kuard", NOW + 601), held("*", NOW + 121)], [Err(Reason::TooOld), Err(Reason::TooOld)]);
        // A zero is as old as the silence that was seen last.
        assert_eq!(served(silence((0, true)), no_data, NOW + 200, NOW + 310), zero(NOW + 190));
        assert_eq!(served(silence((0, true)), no_data, NOW + 200, NOW + 311), Err(no_data));
    }
}
