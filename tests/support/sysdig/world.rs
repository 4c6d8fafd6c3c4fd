//! What a Sysdig account has seen: containers, their labels and their samples.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::clock::unix_now;

/// Seconds between samples.
pub const STEP: i64 = 10;

const LABELS: [&str; 17] = [
    "agent.id",
    "container.id",
    "container.image",
    "container.name",
    "host.hostName",
    "kubernetes.cluster.name",
    "kubernetes.daemonSet.name",
    "kubernetes.deployment.name",
    "kubernetes.job.name",
    "kubernetes.namespace.name",
    "kubernetes.node.name",
    "kubernetes.pod.name",
    "kubernetes.replicaSet.name",
    "kubernetes.service.name",
    "kubernetes.statefulSet.name",
    "kubernetes.workload.name",
    "kubernetes.workload.type",
];

/// Samples of one metric of one container.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Series {
    Constant(f64),
    /// Samples only within the span, both ends included.
    Since {
        value: f64,
        from_unix: i64,
        until_unix: i64,
    },
}

impl From<f64> for Series {
    fn from(value: f64) -> Self {
        Self::Constant(value)
    }
}

impl Series {
    /// Value and number of the samples after `start`, up to `end`; None if there are none.
    pub fn samples(self, start: i64, end: i64) -> Option<(f64, i64)> {
        let (value, first, last) = match self {
            Self::Constant(value) => (value, start + 1, end),
            Self::Since { value, from_unix, until_unix } => (value, from_unix.max(start + 1), until_unix.min(end)),
        };
        let count = last.div_euclid(STEP) - (first - 1).div_euclid(STEP);
        (count > 0).then_some((value, count))
    }
}

/// One container with the labels that Sysdig gives it.
#[derive(Clone, Debug)]
pub struct Container {
    pub labels: BTreeMap<String, String>,
    pub metrics: BTreeMap<String, Series>,
}

impl Container {
    /// A container with these labels and metrics, and a `container.count` of 1.
    pub fn new(labels: &[(&str, &str)], metrics: &[(&str, f64)]) -> Self {
        let owned = labels.iter().map(|&(id, value)| (id.to_owned(), value.to_owned()));
        let count = ("container.count".to_owned(), Series::Constant(1.0));
        let given = metrics.iter().map(|&(id, value)| (id.to_owned(), value.into()));
        Self { labels: owned.collect(), metrics: std::iter::once(count).chain(given).collect() }
    }

    pub fn label(&self, id: &str) -> Option<&str> {
        self.labels.get(id).map(String::as_str)
    }

    fn belongs_to(&self, namespace: &str, workload: &str) -> bool {
        self.label("kubernetes.namespace.name") == Some(namespace) && self.label("kubernetes.workload.name") == Some(workload)
    }
}

/// The account. All of it may be changed between two questions.
#[derive(Clone, Debug)]
pub struct World {
    pub containers: Vec<Container>,
    /// The newest sample is that old, and then up to one step older.
    pub lag_seconds: u64,
    /// The catalogue of `/api/v2/metrics/descriptors`.
    pub descriptors: Vec<Value>,
    /// Seconds by which Sysdig's clock is ahead of this machine's.
    pub clock_offset: i64,
}

impl Default for World {
    fn default() -> Self {
        Self { containers: Vec::new(), lag_seconds: 0, descriptors: catalogue(), clock_offset: 0 }
    }
}

impl World {
    /// Adds a Deployment's pods `NAME-0`, `NAME-1` and so on, of one container each.
    pub fn deployment(
        &mut self, cluster: &str, namespace: &str, name: &str, service: Option<&str>, replicas: usize, metrics: &[(&str, f64)],
    ) {
        self.workload("deployment", cluster, namespace, name, service, replicas, metrics);
    }

    /// Adds the pods of a workload; `kind` is Sysdig's word for it: `deployment`, `statefulset`, `daemonset`, `job`.
    #[expect(clippy::too_many_arguments, reason = "each is a label of its own, and callers pass literals")]
    pub fn workload(
        &mut self, kind: &str, cluster: &str, namespace: &str, name: &str, service: Option<&str>, replicas: usize,
        metrics: &[(&str, f64)],
    ) {
        let replica_set = format!("{name}-5d9c");
        for index in 0..replicas {
            let pod = format!("{name}-{index}");
            let id = format!("{namespace}-{pod}");
            let mut labels = vec![
                ("container.id", id.as_str()),
                ("container.name", name),
                ("kubernetes.cluster.name", cluster),
                ("kubernetes.namespace.name", namespace),
                ("kubernetes.pod.name", &pod),
                ("kubernetes.workload.name", name),
                ("kubernetes.workload.type", kind),
            ];
            let own = match kind {
                "deployment" => "kubernetes.deployment.name",
                "statefulset" => "kubernetes.statefulSet.name",
                "daemonset" => "kubernetes.daemonSet.name",
                "job" => "kubernetes.job.name",
                other => panic!("{other} is no workload type that the stand-in knows"),
            };
            labels.push((own, name));
            if kind == "deployment" {
                labels.push(("kubernetes.replicaSet.name", &replica_set));
            }
            labels.extend(service.map(|service| ("kubernetes.service.name", service)));
            self.containers.push(Container::new(&labels, metrics));
        }
    }

    pub fn remove_workload(&mut self, namespace: &str, name: &str) {
        self.containers.retain(|container| !container.belongs_to(namespace, name));
    }

    /// The containers of a workload, in the order of their pods.
    pub fn containers_of(&mut self, namespace: &str, name: &str) -> impl Iterator<Item = &mut Container> {
        self.containers.iter_mut().filter(move |container| container.belongs_to(namespace, name))
    }

    /// Sets a metric of all containers of a workload.
    pub fn set(&mut self, namespace: &str, name: &str, metric: &str, series: impl Into<Series>) {
        let series = series.into();
        for container in self.containers_of(namespace, name) {
            container.metrics.insert(metric.to_owned(), series);
        }
    }

    /// Takes a metric from all containers of a workload, as if they never had a sample.
    pub fn unset(&mut self, namespace: &str, name: &str, metric: &str) {
        for container in self.containers_of(namespace, name) {
            container.metrics.remove(metric);
        }
    }

    /// Adds a metric to the catalogue.
    pub fn describe(&mut self, id: &str, metric_type: &str) {
        self.descriptors.push(descriptor(id, metric_type, "number", "statsd"));
    }

    /// Sysdig's clock, unix seconds.
    pub fn now(&self) -> i64 {
        unix_now() + self.clock_offset
    }

    /// The time of the newest sample there can be.
    pub fn newest(&self) -> i64 {
        let lag = i64::try_from(self.lag_seconds).expect("a lag in seconds");
        (self.now() - lag).div_euclid(STEP) * STEP
    }

    pub fn is_label(&self, id: &str) -> bool {
        LABELS.contains(&id)
            || ["agent.tag.", "kubernetes.pod.label."].iter().any(|prefix| id.starts_with(prefix))
            || self.containers.iter().any(|container| container.labels.contains_key(id))
    }

    pub fn is_metric(&self, id: &str) -> bool {
        let described = |entry: &&Value| entry["id"] == id && !is_label_entry(entry);
        self.descriptors.iter().any(|entry| described(&entry))
            || self.containers.iter().any(|container| container.metrics.contains_key(id))
            || catalogue().iter().any(|entry| described(&entry))
    }
}

/// The catalogue of an account whose agents send HTTP, file, memory and JVM metrics.
pub fn catalogue() -> Vec<Value> {
    [
        ("net.http.request.count", "counter", "int", "network"),
        ("net.http.request.time", "gauge", "relativeTime", "network"),
        ("net.http.error.count", "counter", "int", "network"),
        ("net.request.count", "counter", "int", "network"),
        ("net.bytes.total", "counter", "byte", "network"),
        ("net.connection.count.total", "counter", "int", "network"),
        ("file.iops.total", "counter", "number", "file"),
        ("file.bytes.total", "counter", "byte", "file"),
        ("memory.used.percent", "gauge", "%", "system"),
        ("memory.bytes.used", "gauge", "byte", "system"),
        ("cpu.used.percent", "gauge", "%", "system"),
        ("cpu.cores.used", "gauge", "number", "system"),
        ("container.count", "gauge", "int", "system"),
        ("jvm.heap.used", "counter", "number", "jmx"),
        ("kubernetes.namespace.name", "none", "string", "kubernetes"),
        ("kubernetes.pod.name", "none", "string", "kubernetes"),
    ]
    .map(|(id, metric_type, value_type, category)| descriptor(id, metric_type, value_type, category))
    .into()
}

/// Whether an entry of the catalogue is a label.
pub fn is_label_entry(entry: &Value) -> bool {
    matches!(entry["metricType"].as_str(), Some("none" | "segmentBy"))
}

fn descriptor(id: &str, metric_type: &str, value_type: &str, category: &str) -> Value {
    let (time, group) = match metric_type {
        "none" => (json!(["concat"]), json!(["concat"])),
        "counter" => (json!(["timeAvg", "avg", "sum", "min", "max", "rateOfChange"]), json!(["sum", "avg", "min", "max"])),
        _ => (json!(["avg", "timeAvg", "sum", "min", "max"]), json!(["avg", "sum", "min", "max"])),
    };
    json!({
        "id": id, "metricType": metric_type, "type": value_type, "scale": 1, "category": category,
        "namespaces": ["host.container", "kubernetes.pod"], "scopes": [],
        "timeAggregations": time, "groupAggregations": group,
        "identity": false, "canMonitor": metric_type != "none", "canGroupBy": metric_type == "none",
        "canFilter": metric_type == "none", "heuristic": false, "documented": true,
    })
}
