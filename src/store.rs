//! What is asked for and what is known of it; when Sysdig is asked next, and for what. Neither waits nor does I/O.

use crate::prelude::*;
use crate::{config::Config, kube::named, random, readings::Item, route::Select};
use crate::{sysdig::Question, timestamp::rfc3339};

/// What nobody asks for any more is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(300);
const MOST_ASKS: usize = 12_000;
/// With more questions than this, those that were asked once make room.
const MOST_QUESTIONS: usize = 1_000;
/// Sysdig locks an account out for so long.
/// Source: <https://docs.sysdig.com/en/docs/developer-tools/working-with-the-data-api/>.
const LOCKOUT: Duration = Duration::from_secs(15);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// As many failures in a row close the way to Sysdig; then one query at a time tries it.
const FAILURES: u32 = 3;
/// What becomes due meanwhile is this late at the most.
const NAP: Duration = Duration::from_millis(500);

/// What Sysdig is asked, about which objects, and what is done with the answer.
pub(crate) struct Plan {
    pub(crate) question: Question,
    pub(crate) select: Select,
}

/// An answer for each of the selections, or why there is none for all of them.
pub(crate) type Outcome = Result<Vec<Result<Vec<Item>>>>;

pub(crate) struct Store {
    interval: Duration,
    most_queries: u64,
    /// In seconds, for what is served.
    max_age: u64,
    batches: BTreeMap<Question, Batch>,
    running: usize,
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
    /// Asked for more than once: kept fresh.
    again: bool,
    waiting: bool,
    answers: u64,
    answered: Option<Instant>,
    /// The last good values, and why there are none since then (Unix seconds).
    items: Vec<Item>,
    error: Option<(Error, u64)>,
}

impl Store {
    pub(crate) fn new(config: &Config) -> Self {
        let (interval, most_queries, max_age) = (config.refresh_interval, config.max_queries, config.max_age.as_secs());
        Self { interval, most_queries, max_age, batches: BTreeMap::new(), running: 0, failures: 0, closed: None }
    }

    /// What is known without asking Sysdig; None if it must be asked.
    pub(crate) fn known(&mut self, plan: &Plan, now: u64) -> Option<Result<Vec<Item>>> {
        let ask = self.batches.get_mut(&plan.question)?.asks.get_mut(&plan.select)?;
        let fresh = ask.answered?.elapsed() < self.interval * 2 || (ask.again && !self.interval.is_zero());
        fresh.then(|| {
            (ask.last, ask.again) = (Some(Instant::now()), true);
            ask.outcome(plan, self.max_age, now)
        })
    }

    /// Notes that somebody waits for an answer. Returns how often there was one. Errors: there is no room.
    pub(crate) fn want(&mut self, plan: &Plan) -> Result<u64> {
        if self.batches.len() >= MOST_QUESTIONS || self.asks().count() >= MOST_ASKS {
            self.forget(|ask| !ask.again);
        }
        let room = self.asks().count() < MOST_ASKS;
        ensure!(room, Overloaded, "more metrics are asked for than the adapter keeps ({MOST_ASKS})");
        let batch = self.batches.entry(plan.question.clone()).or_default();
        let ask = batch.asks.entry(plan.select.clone()).or_default();
        ask.again |= ask.last.is_some();
        (ask.last, ask.waiting) = (Some(Instant::now()), true);
        Ok(ask.answers)
    }

    /// What somebody waited for since there were `before` answers.
    pub(crate) fn answer(&self, plan: &Plan, before: u64, now: u64) -> Option<Result<Vec<Item>>> {
        let ask = self.batches.get(&plan.question)?.asks.get(&plan.select)?;
        (ask.answers > before).then(|| ask.outcome(plan, self.max_age, now))
    }

    fn asks(&self) -> impl Iterator<Item = &Ask> {
        self.batches.values().flat_map(|batch| batch.asks.values())
    }

    /// Why Sysdig is not asked just now, if it is not.
    pub(crate) fn closed(&self) -> Option<Error> {
        let (until, error) = self.closed.as_ref()?;
        let left = until.checked_duration_since(Instant::now())?.as_secs() + 1;
        let message = format!("{}; it is asked again in {left} s", error.message);
        Some(Error { reason: error.reason, message, retry_after: Some(left) })
    }

    /// What Sysdig is asked next, what somebody waits for first. Errors: for how long there is nothing to ask.
    pub(crate) fn next(&mut self) -> Result<(Question, Vec<Select>), Duration> {
        let now = Instant::now();
        let pause = self.closed.as_ref().map_or(Duration::ZERO, |(until, _)| until.saturating_duration_since(now));
        if !pause.is_zero() || (self.failures >= FAILURES && self.running > 0) {
            return Err(pause.max(NAP));
        }
        let wanted = |ask: &Ask| ask.waiting || (ask.again && !self.interval.is_zero());
        let rank = |batch: &Batch| (!batch.asks.values().any(|ask| ask.waiting), batch.due);
        let idle = self.batches.iter_mut().filter(|(_, batch)| !batch.running && batch.asks.values().any(wanted));
        let Some((question, batch)) = idle.min_by_key(|(_, batch)| rank(batch)) else { return Err(NAP) };
        if let (true, Some(due)) = rank(batch)
            && due > now
        {
            return Err(NAP.min(due - now));
        }
        batch.running = true;
        self.running += 1;
        let selects = batch.asks.iter().filter(|(_, ask)| wanted(ask)).map(|(select, _)| select.clone());
        Ok((question.clone(), selects.collect()))
    }

    /// Takes in what an attempt to answer `selects` came to, and how many queries it took.
    pub(crate) fn done(&mut self, question: &Question, selects: &[Select], outcome: Outcome, cost: u64, now: u64) {
        self.running -= 1;
        if cost > 0 {
            self.judge(outcome.as_ref().err());
        }
        // All share the budget, without the fifth that is left to first asks.
        let total: u64 = self.batches.values().map(|batch| batch.cost).sum();
        let interval = self.interval.max(Duration::from_millis(75_000 * total / self.most_queries.max(1)));
        let Some(batch) = self.batches.get_mut(question) else { return };
        // What is everybody's is waited out for all at once, and over for all at once.
        let own = outcome.as_ref().is_err_and(|error| !error.reason.is_everybodys());
        batch.failures = if own { batch.failures + 1 } else { 0 };
        batch.due = Some(Instant::now() + interval * 2_u32.pow(batch.failures.saturating_sub(1).min(3)));
        (batch.running, batch.cost) = (false, cost);
        let answers = outcome.unwrap_or_else(|error| vec![Err(error); selects.len()]);
        for (select, answer) in selects.iter().zip(answers) {
            if let Some(ask) = batch.asks.get_mut(select) {
                ask.take(answer, self.interval.is_zero(), now);
            }
        }
        self.forget(|_| false);
    }

    /// A failure that is everybody's closes the way to Sysdig: a limit of the rate at once, others when they repeat.
    fn judge(&mut self, error: Option<&Error>) {
        let error = error.filter(|error| error.reason.is_everybodys());
        self.failures = if error.is_some() { self.failures + 1 } else { 0 };
        self.closed = error.and_then(|error| {
            let asked = error.retry_after.map_or(LOCKOUT, Duration::from_secs).min(LONGEST_PAUSE);
            let backoff = self.interval * self.failures.saturating_sub(FAILURES - 1).min(3);
            let pause = if error.reason == Reason::BackendRateLimited { asked } else { backoff };
            let until = Instant::now() + pause.mul_f64(1.0 + random() / 4.0);
            (!pause.is_zero()).then(|| (until, error.clone()))
        });
    }

    fn forget(&mut self, more: impl Fn(&Ask) -> bool) {
        for batch in self.batches.values_mut() {
            let old = |ask: &Ask| ask.last.is_some_and(|last| last.elapsed() > FORGOTTEN);
            batch.asks.retain(|_, ask| ask.waiting || !(old(ask) || more(ask)));
        }
        self.batches.retain(|_, batch| batch.running || !batch.asks.is_empty());
    }
}

impl Ask {
    fn take(&mut self, answer: Result<Vec<Item>>, forgetful: bool, now: u64) {
        (self.answers, self.answered, self.waiting) = (self.answers + 1, Some(Instant::now()), false);
        match answer {
            Ok(items) => (self.items, self.error) = (items, None),
            Err(error) => {
                if forgetful || !error.reason.is_passing() {
                    self.items.clear();
                }
                let since = self.error.as_ref().map_or(now, |(_, since)| *since);
                self.error = Some((error, since));
            }
        }
    }

    /// The values that are not too old, or why there are none.
    fn outcome(&self, Plan { question, select }: &Plan, max_age: u64, now: u64) -> Result<Vec<Item>> {
        let age = |item: &Item| now.saturating_sub(item.2);
        let good: Vec<Item> = self.items.iter().filter(|item| age(item) <= max_age).cloned().collect();
        match (&self.error, self.items.iter().map(age).min()) {
            _ if !good.is_empty() => Ok(good),
            (Some((error, since)), Some(age)) => {
                let (message, since) = (&error.message, rfc3339(*since));
                Err(Error::new(error.reason, format!("{message} (since {since}; the last value is {age} s old)")))
            }
            (Some((error, _)), None) => Err(error.clone()),
            (None, age) => {
                let object = named(select.resource, &select.namespace, &select.name);
                let (metric, age) = (&question.metric, age.unwrap_or_default());
                let bound = format!("over MAX_AGE ({max_age} s)");
                Err(refusal!(TooOld, "the newest sample of {metric} for {object} is {age} s old, {bound}"))
            }
        }
    }
}
