//! From a typed question to a value: the object must exist, Sysdig must know it, the number must be fresh.
//!
//! An error makes an autoscaler hold; a false zero scales production down. So nothing here becomes
//! zero without proof.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::changes::Changes;
use crate::config::Config;
use crate::error::{Error, Reason, Result, refusal};
use crate::kube::Kube;
use crate::lock;
use crate::quantity::Quantity;
use crate::route::{AVERAGE, Read, Resource};
use crate::sysdig::{Label, Row, Sysdig, WINDOW};

const NAMESPACE: &str = "kubernetes.namespace.name";
const WORKLOAD_TYPE: &str = "kubernetes.workload.type";
const WORKLOAD_NAME: &str = "kubernetes.workload.name";
const KUBERNETES: &str = "Kubernetes API";
const SYSDIG: &str = "Sysdig";
/// For how many seconds it stays known that a metric is collected, and that it is not.
const COLLECTED: u64 = 600;
const NOT_COLLECTED: u64 = 60;
const MOST_METRICS: usize = 1000;

/// Reads metrics of objects.
pub struct Readings {
    kube: Arc<Kube>,
    sysdig: Arc<Sysdig>,
    changes: Arc<Changes>,
    max_age: Duration,
    collected: Mutex<BTreeMap<String, (bool, u64)>>,
}

impl Readings {
    /// Reads objects from `kube` and values from `sysdig`.
    pub fn new(config: &Config, kube: Arc<Kube>, sysdig: Arc<Sysdig>, changes: Arc<Changes>) -> Self {
        Self { kube, sysdig, changes, max_age: config.max_age, collected: Mutex::default() }
    }

    /// The value that a question asks for at `now`, and the end of the window it sums up, both in Unix seconds.
    /// Errors: There is none that could be trusted; the reason says why.
    pub fn read(&self, read: &Read, now: u64) -> Result<(Quantity, u64)> {
        self.sysdig.check_configured()?;
        self.noted(KUBERNETES, self.kube.check_object(read.resource, &read.namespace, &read.object))?;
        let labels = labels(read);
        let row = self.noted(SYSDIG, self.sysdig.row(&read.metric, read.aggregation, &labels, now))?;
        let row = row.ok_or_else(|| unknown_object(read))?;
        check_age(read, &row, now, self.max_age)?;
        let quantity = match row.value {
            Some(Ok(quantity)) if read.aggregation == AVERAGE => quantity,
            Some(Ok(quantity)) => self.check_all_seen(read, &labels, now).map(|()| quantity)?,
            Some(Err(reason)) => return Err(unfit(read, reason)),
            None => self.proved_zero(read, &labels, now)?,
        };
        Ok((quantity, row.end))
    }

    /// Makes sure that Sysdig sees every Ready pod of the object: a sum over fewer would be too small.
    fn check_all_seen(&self, read: &Read, labels: &[Label<'_>], now: u64) -> Result<()> {
        let ready = self.kube.ready_pods(read.resource, &read.namespace, &read.object);
        let ready = self.noted(KUBERNETES, ready)?.unwrap_or(1).max(1);
        let seen = self.noted(SYSDIG, self.sysdig.pods(labels, now))?;
        if seen >= ready {
            return Ok(());
        }
        let (metric, object) = (&read.metric, object(read));
        Err(refusal!(
            NoData,
            "Sysdig has no value of {metric} for all of {object}: in the last {WINDOW} s it sees {seen} of its {ready} \
             ready pods, does the Sysdig agent run on every node?"
        ))
    }

    /// Silence means idleness only if Sysdig sees the whole object, and if this metric is collected in
    /// this cluster at all.
    fn proved_zero(&self, read: &Read, labels: &[Label<'_>], now: u64) -> Result<Quantity> {
        self.check_all_seen(read, labels, now)?;
        if self.is_collected(&read.metric, now)? {
            return Ok(Quantity::ZERO);
        }
        Err(refusal!(
            MetricNotCollected,
            "Sysdig has no sample of {} in the whole cluster within a day: is the id right, and does the agent's mode \
                 collect it? (agents in essentials mode send no HTTP metrics)",
            read.metric
        ))
    }

    fn is_collected(&self, metric: &str, now: u64) -> Result<bool> {
        let known = lock(&self.collected).get(metric).copied();
        if let Some((collected, until)) = known
            && now < until
        {
            return Ok(collected);
        }
        let collected = self.noted(SYSDIG, self.sysdig.is_collected(metric, now))?;
        let until = now + if collected { COLLECTED } else { NOT_COLLECTED };
        let mut known = lock(&self.collected);
        if known.len() >= MOST_METRICS {
            known.clear();
        }
        known.insert(metric.to_owned(), (collected, until));
        Ok(collected)
    }

    /// A mistake in the question is the caller's affair and no state of who was asked. That Sysdig
    /// refuses every question, because it is none, shows in the metric catalogue.
    fn noted<T>(&self, asked: &'static str, result: Result<T>) -> Result<T> {
        let callers = [Reason::ObjectNotFound, Reason::Ambiguous, Reason::InvalidRequest, Reason::BackendRejected];
        if result.as_ref().err().is_none_or(|error| !callers.contains(&error.reason)) {
            self.changes.note(asked, &result);
        }
        result
    }
}

/// The labels that name the object in Sysdig; the cluster is added by the backend.
fn labels(read: &Read) -> Vec<Label<'_>> {
    let mut labels = vec![(NAMESPACE, read.namespace.as_str())];
    if read.described != read.resource {
        labels.push((WORKLOAD_TYPE, read.resource.workload_type));
        labels.push((WORKLOAD_NAME, read.object.as_str()));
    } else if !read.resource.label.is_empty() {
        labels.push((read.resource.label, read.object.as_str()));
    }
    labels
}

fn object(read: &Read) -> String {
    match *read.resource {
        Resource::NAMESPACES => format!("namespace {}", read.object),
        Resource { kind, .. } => format!("{kind} {}/{}", read.namespace, read.object),
    }
}

fn unknown_object(read: &Read) -> Error {
    refusal!(
        NoData,
        "Sysdig has no sample of {} for {} in the last {WINDOW} s, and none of its containers: is CLUSTER_NAME the name \
             that Sysdig shows, does the token's team see this namespace, does the agent run?",
        read.metric,
        object(read)
    )
}

fn check_age(read: &Read, row: &Row, now: u64, max_age: Duration) -> Result<()> {
    let age = now.saturating_sub(row.end);
    if age <= max_age.as_secs() {
        return Ok(());
    }
    Err(refusal!(
        TooOld,
        "the newest sample of {} for {} is {age} s old, more than MAX_AGE ({} s)",
        read.metric,
        object(read),
        max_age.as_secs()
    ))
}

fn unfit(read: &Read, reason: Reason) -> Error {
    let mistake = match reason {
        Reason::OutOfRange => "is beyond what a HorizontalPodAutoscaler can compute with (9223372036854775.807)",
        _ => "is not a finite number",
    };
    Error::new(reason, format!("the value of {} for {} {mistake}", read.metric, object(read)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::{Route, route};

    fn read_of(rest: &str) -> Read {
        let target = format!("/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/{rest}");
        let Ok(Route::Read(read)) = route("GET", &target) else { panic!("{target}") };
        *read
    }

    #[test]
    fn objects_are_named_by_sysdigs_labels() {
        let table: [(&str, &[Label<'_>]); 10] = [
            ("pods/p/m", &[("kubernetes.pod.name", "p")]),
            ("services/s/m", &[("kubernetes.service.name", "s")]),
            ("deployments.apps/d/m", &[("kubernetes.deployment.name", "d")]),
            ("statefulsets.apps/d/m", &[("kubernetes.statefulSet.name", "d")]),
            ("daemonsets.apps/d/m", &[("kubernetes.daemonSet.name", "d")]),
            ("replicasets.apps/d/m", &[("kubernetes.replicaSet.name", "d")]),
            ("jobs.batch/d/m", &[("kubernetes.job.name", "d")]),
            ("metrics/m", &[]),
            ("services/deployment;kuard/m", &[(WORKLOAD_TYPE, "deployment"), (WORKLOAD_NAME, "kuard")]),
            ("services/statefulset;db/m", &[(WORKLOAD_TYPE, "statefulset"), (WORKLOAD_NAME, "db")]),
        ];
        for (rest, expected) in table {
            let read = read_of(rest);
            let found = labels(&read);
            assert_eq!(found.first(), Some(&(NAMESPACE, "default")));
            assert_eq!(&found[1..], expected, "{rest}");
        }
    }

    #[test]
    fn a_value_is_served_up_to_its_age_and_no_longer() {
        let read = read_of("services/s/m");
        let row = Row { end: 1000, value: None };
        for (now, fresh) in [(1000, true), (990, true), (1120, true), (1121, false)] {
            assert_eq!(check_age(&read, &row, now, Duration::from_secs(120)).is_ok(), fresh, "{now}");
        }
    }
}
