//! From a typed question to a value, with one query to Sysdig for all objects that are asked about.
//! An error makes an autoscaler hold; a false zero scales production down: nothing becomes zero without proof.

use crate::handler::{Handler, Stop, WAIT, guarded};
use crate::prelude::*;
use crate::store::{Job, Outcome, Plan, Store};
use crate::{data, promql, sysdig::QUERIES, sysdig::window_end};
use std::cell::LazyCell;

const KUBERNETES: &str = "Kubernetes API";
const SYSDIG: &str = "Sysdig";
/// A first ask waits so long for its answer; the query goes on for the next asker.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
/// With objects in more namespaces than this, one list of the whole cluster takes the place of one for each.
const MOST_LISTS: usize = 3;

/// An object's name and value, and the end of the window it sums up in Unix seconds.
pub(crate) type Item = (String, Quantity, u64);

impl Handler {
    /// The values at `now` (Unix seconds), for `*` those to be trusted, and the seconds of samples that each sums up.
    /// Errors: There is none and the reason says why, or [`WAIT`].
    pub(crate) fn read(&self, read: &Read, wait: Duration, now: u64) -> Result<(Vec<Item>, u64), Stop> {
        let plan = self.plan(read)?;
        let window = plan.0.tuning.window;
        let mut store = lock(&self.store);
        let known = store.known(&plan, Instant::now(), now);
        if known.is_some() || wait.is_zero() {
            return Ok((known.ok_or(WAIT)??, window));
        }
        self.sysdig.check_configured()?;
        let before = store.want(&plan, Instant::now())?;
        self.news.notify_all();
        let answer = |store: &Store| store.answer(&plan, before, Instant::now(), now);
        let pending = |store: &mut Store| answer(store).is_none();
        let store = self.news.wait_timeout_while(store, wait, pending).unwrap_or_else(PoisonError::into_inner).0;
        let slow = || refusal!(BackendTimeout, "no answer of Sysdig within {wait:?}; the query goes on: ask again");
        Ok((answer(&store).ok_or_else(slow)??, window))
    }

    pub(crate) fn plan(&self, read: &Read) -> Result<Plan> {
        let defined = self.definitions.find(&read.metric)?;
        // The autoscaler's settings win; the labels of both must hold.
        let (labels, mut tuning) = settle(&[&*defined.selector, &*read.selector].concat());
        let metric = if defined.metric.is_empty() { &read.metric } else { &defined.metric }.clone();
        let promql = self.sysdig.speaks_promql(&metric);
        // Nobody having declared an aggregation, an external metric must be one series, where that can be told; of each
        // object a template's must be one, and what the agent itself tells is one for each container.
        let single = promql && (read.api.0 == EXTERNAL || metric.contains('{'));
        let own = metric.contains('.') || metric.starts_with("sysdig_");
        if tuning.group.is_empty() && !single {
            tuning.group = if promql && !own { promql::EACH } else { "avg" };
        }
        let mut select = read.select.clone();
        if let Some(resource) = defined.scope {
            let (one, what) = (!read.namespace.is_empty() && read.name != "*", resource.kind);
            ensure!(one, InvalidRequest, "{} measures a {what}: ask for one object of a namespace by its name", read.metric);
            let name = if *resource == Resource::CLUSTER { "" } else { &read.namespace }.to_owned();
            select = Select { resource, namespace: String::new(), name, labels: String::new() };
        }
        // No label tells a Service in PromQL, and a pod can be behind several: there a Service is what it selects.
        let selecting = promql && *select.resource == Resource::SERVICES;
        ensure!(!selecting || select.name != "*", InvalidRequest, "in PromQL services are read by name only: read pods instead");
        let resource = if selecting { &Resource::PODS } else { select.resource };
        let legacy = *read.described == Resource::SERVICES && !resource.workload_type.is_empty();
        Ok((Question { metric, tuning, resource, legacy, labels }, select, defined))
    }

    /// Asks Sysdig for what is wanted or due, or waits until there may be something.
    pub(crate) fn refresh(&self) {
        let (mut store, now) = (lock(&self.store), unix_now());
        match store.next(Instant::now()) {
            Err(pause) => drop(self.news.wait_timeout(store, pause)),
            Ok(job) => {
                drop(store);
                let outcome = guarded(|| self.fetch(&job, now));
                lock(&self.store).done(&job, outcome, QUERIES.take(), Instant::now(), now);
                self.news.notify_all();
            }
        }
    }

    fn fetch(&self, (question, selects): &Job, now: u64) -> Outcome {
        let wide = selects.iter().map(|select| &select.namespace).collect::<BTreeSet<_>>().len() > MOST_LISTS;
        let objects: Vec<_> = selects.iter().map(|it| noted(KUBERNETES, self.objects(it, question.resource, wide))).collect();
        let scope: Scope = objects.iter().flatten().flatten().cloned().unzip();
        let few: Vec<_> = scope.1.iter().take(10).map(String::as_str).collect();
        log::debug!("objects: {} {}: {}", scope.1.len(), question.resource.plural, few.join(", "));
        let rows = if scope.1.is_empty() { Rows::new() } else { noted(SYSDIG, self.sysdig.rows(question, &scope, now))? };
        // The pods that Sysdig sees, of all objects, once they are asked for.
        let pods = LazyCell::new(|| noted(SYSDIG, data::pods(self.sysdig, question, &scope, window_end(now))));
        let seen = |object: &Object| Ok(*pods.as_ref().map_err(Error::clone)?.get(object).unwrap_or(&0));
        let item = |object: &Object| self.item(question, object, rows.get(object), || seen(object), wide, now);
        Ok(selects.iter().zip(objects).map(|(select, objects)| reading(question, select, objects?.iter().map(item))).collect())
    }

    /// The objects, which exist, whose rows a reading is made of. Looked up in one list of the whole cluster if `wide`.
    fn objects(&self, Select { resource, namespace, name, labels }: &Select, rows: &Resource, wide: bool) -> Result<Vec<Object>> {
        let (place, object) = (if wide { "" } else { namespace }, (namespace.clone(), name.clone()));
        if name == "*" {
            let (found, plural) = (self.kube.objects(resource, namespace, labels, None)?, resource.plural);
            ensure!(!found.is_empty(), ObjectNotFound, "there are no {plural} with labels {labels:?} in {namespace:?}");
            return Ok(found.keys().cloned().collect());
        }
        let exists = name.is_empty() || self.kube.objects(resource, place, "", Some(&object))?.contains_key(&object);
        ensure!(exists, ObjectNotFound, "{} does not exist", named(resource, namespace, name));
        if resource == &rows {
            return Ok(vec![object]);
        }
        let (_, pods) = self.kube.ready(resource, place, &object)?;
        ensure!(!pods.is_empty(), PartlySeen, "{} has no ready pods", named(resource, namespace, name));
        Ok(pods.into_iter().map(|pod| (namespace.clone(), pod)).collect())
    }

    /// The value of an object's row, with its proof; `seen` tells how many of its pods Sysdig sees where the row does not.
    fn item(
        &self, question: &Question, object: &Object, row: Option<&Row>, seen: impl FnOnce() -> Result<u64>, wide: bool, now: u64,
    ) -> Result<Item> {
        let Question { metric, tuning, resource, labels, .. } = question;
        let (what, window, host) = (named(resource, &object.0, &object.1), tuning.window, **resource == Resource::NODES);
        // Where no pods are counted, nothing tells idleness from an exporter that died, but for what the agent counts.
        let counted = resource.counts_pods() || **resource == Resource::PODS;
        let provable = !host && (counted || promql::series(question).is_ok_and(|(_, kind)| kind == "delta"));
        let Some(row) = row.filter(|row| row.value.is_some() || provable) else {
            let selected = if labels.is_empty() { "" } else { " with the labels of the metric's selector" };
            let ask = "is CLUSTER_NAME the name that Sysdig shows, does the token's team see this namespace, does the agent run?";
            return Err(refusal!(NoData, "Sysdig has no sample of {metric} for {what}{selected} in the last {window} s: {ask}"));
        };
        let value = row.value.unwrap_or(Ok(Quantity::ZERO)).map_err(|reason| no_value(reason, metric, &what, &row.differing))?;
        // A sum over fewer pods than are Ready would be too small, and silence is idleness only if Sysdig sees them all.
        if row.value.is_none() || (tuning.group == "sum" && resource.counts_pods()) {
            let place = if wide { "" } else { &object.0 };
            let ready = resource.counts_pods().then(|| self.kube.ready(resource, place, object));
            let ready = noted(KUBERNETES, ready.transpose())?.map_or(1, |(count, _)| count.max(1));
            let seen = row.pods.map_or_else(seen, Ok)?;
            let part = format!("in the last {window} s it sees {seen} of its {ready} ready pods");
            let ask = "does the Sysdig agent run on every node?";
            ensure!(seen >= ready, PartlySeen, "Sysdig has no value of {metric} for all of {what}: {part}, {ask}");
        }
        let collected = row.value.is_some() || noted(SYSDIG, self.sysdig.is_collected(question, now))?;
        let ask = "is the id right, and does the agent's mode collect it? (agents in essentials mode send no HTTP metrics)";
        ensure!(collected, MetricNotCollected, "Sysdig has no sample of {metric} in the whole cluster within a day: {ask}");
        Ok((object.1.clone(), value, row.end))
    }
}

/// A mistake in the question is no state of who was asked. A Sysdig that is none shows in the metric catalogue.
fn noted<T>(asked: &'static str, result: Result<T>) -> Result<T> {
    let callers = [Reason::ObjectNotFound, Reason::PartlySeen, Reason::InvalidRequest, Reason::BackendRejected];
    let theirs = result.as_ref().is_err_and(|error| callers.contains(&error.reason));
    if theirs { result } else { metrics::noted(asked, result) }
}

/// The values of a reading: those of its objects that have one, or that of a Service out of its pods'.
fn reading(question: &Question, select: &Select, found: impl Iterator<Item = Result<Item>>) -> Result<Vec<Item>> {
    let (items, errors): (Vec<_>, Vec<_>) = found.partition(Result::is_ok);
    let items: Vec<Item> = items.into_iter().flatten().collect();
    // What does not pass by itself is told first, and that there is just nothing last.
    let rank = |error: &Error| (error.reason.is_passing(), error.reason == Reason::NoData);
    let mut refusal = errors.into_iter().filter_map(Result::err).min_by_key(rank);
    let own = select.resource == question.resource;
    if let Some(error) = refusal.take_if(|error| items.is_empty() || !(own || error.reason.is_passing())) {
        return Err(error);
    }
    let Some(end) = items.iter().map(|(_, _, end)| *end).min().filter(|_| !own) else { return Ok(items) };
    let (metric, group) = (&question.metric, question.tuning.group);
    let what = named(select.resource, &select.namespace, &select.name);
    let value = Quantity::combine(group, items.iter().map(|(_, value, _)| *value));
    let value = value.map_err(|reason| no_value(reason, metric, &what, ""))?;
    let partly = refusal.filter(|_| group == "sum" || value == Quantity::ZERO);
    partly.map_or(Ok(()), |error| Err(Error::new(Reason::PartlySeen, error.message)))?;
    Ok(vec![(select.name.clone(), value, end)])
}

fn no_value(reason: Reason, metric: &str, what: &str, differing: &str) -> Error {
    let mend = "select one by these labels, or declare sysdig/group-aggregation=avg|sum|min|max";
    let mistake = match reason {
        Reason::OutOfRange => "is beyond what an autoscaler can compute with (9223372036854775.807)",
        Reason::Ambiguous if differing.is_empty() => "stands in Sysdig's answer more than once",
        Reason::Ambiguous => &format!("is that of several series, which differ in {differing}: {mend}"),
        _ => "is not a finite number",
    };
    Error::new(reason, format!("the value of {metric} for {what} {mistake}"))
}
