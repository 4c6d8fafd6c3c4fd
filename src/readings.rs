//! From a typed question to a value: the object must exist, Sysdig must know it, the number must be fresh.
//! An error makes an autoscaler hold; a false zero scales production down: nothing becomes zero without proof.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::changes::Changes;
use crate::config::Config;
use crate::error::{Error, Reason, Result, refusal};
use crate::kube::{Kube, named};
use crate::lock;
use crate::quantity::Quantity;
use crate::route::{Read, Resource};
use crate::selector::Requirement;
use crate::sysdig::{Question, Row, Sysdig};

const WORKLOAD_TYPE: &str = "kubernetes.workload.type";
const WORKLOAD_NAME: &str = "kubernetes.workload.name";
const KUBERNETES: &str = "Kubernetes API";
const SYSDIG: &str = "Sysdig";
/// For how many seconds it stays known that a metric is collected, and that it is not.
const COLLECTED: u64 = 600;
const NOT_COLLECTED: u64 = 60;
const MOST_METRICS: usize = 1000;

/// An object's name and value, and the end of the window it sums up in Unix seconds.
pub(crate) type Item = (String, Quantity, u64);

pub(crate) struct Readings {
    kube: Arc<Kube>,
    sysdig: Arc<Sysdig>,
    changes: Arc<Changes>,
    max_age: Duration,
    collected: Mutex<BTreeMap<String, (bool, u64)>>,
}

impl Readings {
    pub(crate) fn new(config: &Config, kube: Arc<Kube>, sysdig: Arc<Sysdig>, changes: Arc<Changes>) -> Self {
        Self { kube, sysdig, changes, max_age: config.max_age, collected: Mutex::default() }
    }

    /// The values that a question asks for at `now` (Unix seconds): one for an object that is named, and for `*` one
    /// for each object that has a value to be trusted. Errors: There is none; the reason says why.
    pub(crate) fn read(&self, read: &Read, now: u64) -> Result<Vec<Item>> {
        self.sysdig.check_configured()?;
        let (question, names) = self.noted(KUBERNETES, self.question(read))?;
        let mut rows: BTreeMap<String, Row> = BTreeMap::new();
        for row in self.noted(SYSDIG, self.sysdig.rows(&question, now))? {
            let (object, metric) = (named(read.resource, &read.namespace, &row.object), &read.metric);
            if rows.insert(row.object.clone(), row).is_some() {
                return Err(refusal!(Ambiguous, "Sysdig has more than one series of {metric} for {object}"));
            }
        }
        let row = |name| rows.get(if question.by.is_some() { name } else { "" });
        let items = names.iter().map(|name| self.item(read, &question, name, row(name.as_str()), now));
        let (items, refusals): (Vec<_>, Vec<_>) = items.partition(Result::is_ok);
        match refusals.into_iter().find_map(Result::err) {
            Some(refusal) if items.is_empty() => Err(refusal),
            _ => Ok(items.into_iter().flatten().collect()),
        }
    }

    /// What Sysdig is asked, and about which objects; they exist.
    fn question<'a>(&self, read: &'a Read) -> Result<(Question<'a>, Vec<String>)> {
        let (resource, namespace, all) = (read.resource, &read.namespace, read.object == "*");
        let mut question = Question {
            metric: &read.metric,
            tuning: read.tuning,
            host: *resource == Resource::NODES,
            by: Some(resource.label),
            scope: Vec::new(),
            labels: &read.labels,
        };
        let mut within = |label: &str, values: Vec<String>| {
            question.scope.push(Requirement { key: label.to_owned(), values });
        };
        if !namespace.is_empty() {
            within(Resource::NAMESPACES.label, vec![namespace.clone()]);
        }
        if read.described != resource {
            within(WORKLOAD_TYPE, vec![resource.workload_type.to_owned()]);
            question.by = Some(WORKLOAD_NAME);
        } else if *resource == Resource::SERVICES && self.sysdig.speaks_promql(&read.metric) {
            // No label tells a Service there, and a pod can be behind several: a Service is what it selects.
            if all {
                return Err(refusal!(InvalidRequest, "in PromQL services are read by name only: read pods instead"));
            }
            let pods: Vec<String> = self.kube.ready_endpoints(namespace, &read.object)?.into_iter().collect();
            if pods.is_empty() {
                return Err(refusal!(NoData, "{} has no ready pods", named(resource, namespace, &read.object)));
            }
            within(Resource::PODS.label, pods);
            question.by = None;
        }
        let names = match all {
            true => self.kube.names(resource, namespace, &read.objects)?,
            false => self.kube.check_object(resource, namespace, &read.object).map(|()| vec![read.object.clone()])?,
        };
        Ok((question.about(&names), names))
    }

    fn item(&self, read: &Read, question: &Question<'_>, name: &str, row: Option<&Row>, now: u64) -> Result<Item> {
        let (metric, object, window) =
            (&read.metric, named(read.resource, &read.namespace, name), question.tuning.window);
        let Some(row) = row.filter(|row| row.value.is_some() || !question.host) else {
            let selected = if question.labels.is_empty() { "" } else { " with the labels of the metric's selector" };
            return Err(refusal!(
                NoData,
                "Sysdig has no sample of {metric} for {object}{selected} in the last {window} s: is \
                 CLUSTER_NAME the name that Sysdig shows, does the token's team see this namespace, does the agent run?"
            ));
        };
        let (age, most) = (now.saturating_sub(row.end), self.max_age.as_secs());
        if age > most {
            return Err(refusal!(
                TooOld,
                "the newest sample of {metric} for {object} is {age} s old, over MAX_AGE ({most} s)"
            ));
        }
        let quantity = row.value.unwrap_or(Ok(Quantity::ZERO)).map_err(|reason| {
            let mistake = match reason {
                Reason::OutOfRange => "is beyond what an autoscaler can compute with (9223372036854775.807)",
                _ => "is not a finite number",
            };
            Error::new(reason, format!("the value of {metric} for {object} {mistake}"))
        })?;
        if row.value.is_none() || (question.tuning.group == "sum" && !question.host) {
            self.check_all_seen(read, question, name, row, now)?;
        }
        if row.value.is_none() && !self.is_collected(question, now)? {
            return Err(refusal!(
                MetricNotCollected,
                "Sysdig has no sample of {metric} in the whole cluster within a day: is the id right, and does the agent's \
                 mode collect it? (agents in essentials mode send no HTTP metrics)"
            ));
        }
        Ok((name.to_owned(), quantity, row.end))
    }

    /// Makes sure that Sysdig sees every Ready pod of the object: a sum over fewer would be too small, and silence
    /// means idleness only if Sysdig sees the whole object.
    fn check_all_seen(&self, read: &Read, question: &Question<'_>, name: &str, row: &Row, now: u64) -> Result<()> {
        let ready = self.kube.ready_pods(read.resource, &read.namespace, name);
        let ready = self.noted(KUBERNETES, ready)?.unwrap_or(1).max(1);
        let about = question.clone().about(&[name.to_owned()]);
        let seen = row.pods.map_or_else(|| self.noted(SYSDIG, self.sysdig.pods(&about, now)), Ok)?;
        let (metric, object, window) =
            (&read.metric, named(read.resource, &read.namespace, name), question.tuning.window);
        if seen >= ready {
            return Ok(());
        }
        Err(refusal!(
            NoData,
            "Sysdig has no value of {metric} for all of {object}: in the last {window} s it sees {seen} of its {ready} \
             ready pods, does the Sysdig agent run on every node?"
        ))
    }

    fn is_collected(&self, question: &Question<'_>, now: u64) -> Result<bool> {
        let metric = question.metric;
        let known = lock(&self.collected).get(metric).copied();
        if let Some((collected, until)) = known
            && now < until
        {
            return Ok(collected);
        }
        let collected = self.noted(SYSDIG, self.sysdig.is_collected(question, now))?;
        let until = now + if collected { COLLECTED } else { NOT_COLLECTED };
        let mut known = lock(&self.collected);
        if known.len() >= MOST_METRICS {
            known.clear();
        }
        known.insert(metric.to_owned(), (collected, until));
        Ok(collected)
    }

    /// A mistake in the question is no state of who was asked. A Sysdig that is none shows in the metric catalogue.
    fn noted<T>(&self, asked: &'static str, result: Result<T>) -> Result<T> {
        let callers = [Reason::ObjectNotFound, Reason::Ambiguous, Reason::InvalidRequest, Reason::BackendRejected];
        if result.as_ref().err().is_none_or(|error| !callers.contains(&error.reason)) {
            self.changes.note(asked, &result);
        }
        result
    }
}
