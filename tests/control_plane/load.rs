//! What pods are measured to do, as Sysdig shows it, and autoscalers that follow it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::prometheus::{Prometheus, Samples};
use super::support::METRIC;
use super::support::clock::poll;
use super::support::http::lock;
use super::support::sysdig::{Container, Sysdig};
use super::{CLUSTER, Stage, TOKEN};

/// Length of a queue, which is no object of Kubernetes: as Sysdig's own metrics are called, and as PromQL's are.
const QUEUE: [&str; 2] = ["queue.depth", "queue_depth"];
/// Samples reach into the future, so that there are some however long the test takes.
const ONGOING: i64 = -1200;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What {
    /// The requests of kuard's pods.
    Requests,
    /// The same, and beside each pod's own container a proxy with many more.
    RequestsBehindProxies,
    /// The length of a queue that has nothing to do with the pods, and a longer one that is not meant.
    Queue,
}

/// Who measures it.
pub(crate) enum Backend {
    Data,
    /// With what its samples are of.
    PromQl(Prometheus, Mutex<Option<Measured>>),
}

/// What is measured, how much of it over all, and the pods.
type Measured = (What, f64, Vec<String>);

impl Backend {
    pub(crate) fn prometheus() -> Self {
        Self::PromQl(Prometheus::start(TOKEN, &samples(&(What::Requests, 0.0, Vec::new()))), Mutex::default())
    }

    /// Its name for the length of a queue.
    pub(crate) fn queue(&self) -> &'static str {
        QUEUE[usize::from(matches!(self, Self::PromQl(..)))]
    }

    fn measures(&self, sysdig: &Sysdig, measured: Measured) {
        match self {
            Self::Data => in_sysdig(sysdig, &measured),
            Self::PromQl(prometheus, known) => {
                let mut known = lock(known);
                if known.as_ref() != Some(&measured) {
                    prometheus.replace(&samples(&measured));
                    *known = Some(measured);
                }
            }
        }
    }
}

fn in_sysdig(sysdig: &Sysdig, (what, total, pods): &Measured) {
    let mut world = sysdig.world();
    world.containers.clear();
    world.deployment(CLUSTER, "default", "other", Some("other"), 1, &[(METRIC, 1.0)]);
    let requests = [(METRIC, total / pods.len().max(1) as f64)];
    let requests = if *total > 0.0 && *what != What::Queue { &requests[..] } else { &[] };
    world.deployment(CLUSTER, "default", "kuard", Some("kuard"), pods.len(), requests);
    for (container, name) in world.containers_of("default", "kuard").zip(pods) {
        container.labels.insert("kubernetes.pod.name".to_owned(), name.clone());
    }
    match what {
        What::Requests => {}
        What::RequestsBehindProxies => {
            let proxy = |mut container: Container| {
                container.labels.insert("container.name".to_owned(), "proxy".to_owned());
                container.metrics.insert(METRIC.to_owned(), 500.0.into());
                container
            };
            let proxies: Vec<Container> = world.containers_of("default", "kuard").map(|it| proxy(it.clone())).collect();
            world.containers.extend(proxies);
        }
        What::Queue => {
            let of = |queue, zone| {
                [("kubernetes.cluster.name", CLUSTER), ("kubernetes.namespace.name", "default"), ("queue", queue), ("zone", zone)]
            };
            for (labels, length) in [
                (of("mail", "a"), total / 2.0),
                (of("mail", "b"), total / 2.0),
                (of("mail", "c"), 900.0),
                (of("print", "a"), 1000.0),
            ] {
                world.containers.push(Container::new(&labels, &[(QUEUE[0], length)]));
            }
        }
    }
}

/// Constant ones, which say the same in PromQL.
fn samples((what, total, pods): &Measured) -> Vec<Samples> {
    let mut samples = Vec::new();
    let mut series = |name: &str, labels: &str, value: f64| {
        let series = format!(r#"{name}{{kube_cluster_name="{CLUSTER}",kube_namespace_name="default",{labels}}}"#);
        samples.push(Samples { series, first: value, step: 0.0, newest: ONGOING });
    };
    // What is counted within 10 s.
    let requests = "sysdig_container_net_http_request_count";
    let container = |workload: &str, pod: &str| {
        format!(
            r#"kube_deployment_name="{workload}",kube_workload_type="deployment",kube_workload_name="{workload}",kube_pod_name="{pod}",container_name="{workload}""#
        )
    };
    series("sysdig_container_up", &container("other", "other-0"), 1.0);
    series(requests, &container("other", "other-0"), 10.0);
    for pod in pods {
        series("sysdig_container_up", &container("kuard", pod), 1.0);
        if *total > 0.0 && *what != What::Queue {
            series(requests, &container("kuard", pod), total * 10.0 / pods.len() as f64);
        }
    }
    if *what == What::Queue {
        for (labels, length) in [
            (r#"queue="mail",zone="a""#, total / 2.0),
            (r#"queue="mail",zone="b""#, total / 2.0),
            (r#"queue="mail",zone="c""#, 900.0),
            (r#"queue="print",zone="a""#, 1000.0),
        ] {
            series(QUEUE[1], labels, length);
        }
    }
    samples
}

/// The walk-through's autoscaler with another metric.
pub(crate) fn autoscaler(metric: &Value) -> String {
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": "kuard-autoscaler", "namespace": "default" },
        "spec": {
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "kuard" },
            "minReplicas": 3, "maxReplicas": 10,
            "metrics": [metric],
        },
    })
    .to_string()
}

pub(crate) fn object([kind, version, name]: [&str; 3], metric: &Value, target: &Value) -> Value {
    let described = json!({ "kind": kind, "apiVersion": version, "name": name });
    json!({ "type": "Object", "object": { "describedObject": described, "metric": metric, "target": target } })
}

/// As the autoscaler's status writes it: `4`, `6750m`, `1k`.
fn number(quantity: &str) -> Option<f64> {
    let units = [("m", 1e-3), ("k", 1e3)];
    let scaled = units.iter().find_map(|(unit, size)| Some(quantity.strip_suffix(unit)?.parse::<f64>().ok()? * size));
    scaled.or_else(|| quantity.parse().ok())
}

impl Stage {
    pub(crate) fn load(&self, total: f64) {
        self.load_of(What::Requests, total);
    }

    /// What there is, `total` over all, is that of the pods there are, in equal parts.
    pub(crate) fn load_of(&self, what: What, total: f64) {
        let list = self.plane.json(&["get", "pods", "-l", "app=kuard", "-o", "json"]);
        let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let pods: Vec<&Value> = list["items"].as_array().unwrap().iter().filter(stays).collect();
        let names: Vec<String> = pods.iter().map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).collect();
        let each = total / names.len().max(1) as f64;
        self.backend.measures(&self.sysdig, (what, total, names));
        if pods.iter().any(|pod| pod["status"]["phase"] != "Running") {
            self.until_seen(each, total);
        }
        // Of those only: others that came meanwhile have no load yet.
        self.plane.run_pods(&list);
    }

    /// Waits until the autoscaler, if there is one, has seen what each of the pods does. Pods that are Ready earlier
    /// would be taken to do as much as those before them did when they were fewer. A sum it divides by the replicas that
    /// there are by then, which may be more than those that were listed.
    fn until_seen(&self, each: f64, total: f64) {
        let seen = || {
            let hpa = self.plane.run(&["get", "hpa", "kuard-autoscaler", "--ignore-not-found", "-o", "json"]);
            let Ok(hpa) = serde_json::from_str::<Value>(&hpa) else { return true };
            let metric = &hpa["status"]["currentMetrics"][0];
            let current = ["object", "pods", "external"].iter().find_map(|kind| metric[kind].get("current"));
            let value = current.and_then(|it| it.get("averageValue").or_else(|| it.get("value"))?.as_str());
            let divided = ["object", "external"].iter().any(|kind| !metric[kind]["current"]["averageValue"].is_null());
            let replicas = hpa["status"]["currentReplicas"].as_f64().unwrap_or_default();
            let expected = if divided { total / replicas } else { each };
            value.and_then(number).is_some_and(|value| (value - expected).abs() < 0.01)
        };
        let found = poll(Duration::from_secs(30), || seen().then_some(()));
        assert!(found.is_some(), "{each} is not seen for each pod:\n{}", self.describe());
    }

    pub(crate) fn replicas(&self) -> u64 {
        self.plane.json(&["get", "deployment", "kuard", "-o", "json"])["spec"]["replicas"].as_u64().unwrap()
    }

    pub(crate) fn settle(&self, total: f64, wanted: u64) {
        self.settle_of(What::Requests, total, wanted);
    }

    /// Applies the load until the Deployment has `wanted` replicas, and then for some syncs more.
    pub(crate) fn settle_of(&self, what: What, total: f64, wanted: u64) {
        let started = Instant::now();
        let settled = poll(Duration::from_secs(90), || {
            self.load_of(what, total);
            (self.replicas() == wanted).then_some(())
        });
        assert!(settled.is_some(), "{total} over all are not {wanted} replicas:\n{}", self.describe());
        eprintln!("  {total} over all are {wanted} replicas: after {:.1} s", started.elapsed().as_secs_f64());
        let steady = Instant::now();
        while steady.elapsed() < Duration::from_secs(4) {
            self.load_of(what, total);
            assert_eq!(self.replicas(), wanted, "{}", self.describe());
        }
        eprintln!("  {}", self.plane.run(&["get", "hpa", "kuard-autoscaler", "--no-headers"]).trim());
    }

    pub(crate) fn closed_loop(&self, hpa: &str, what: What) {
        self.load_of(what, 0.0);
        assert!(self.plane.apply(hpa).contains("horizontalpodautoscaler.autoscaling/kuard-autoscaler created"));
        self.settle_of(what, 24.0, 6);
        self.settle_of(what, 40.0, 10);
        self.settle_of(what, 0.0, 3);
        self.plane.run(&["delete", "hpa", "kuard-autoscaler"]);
    }

    pub(crate) fn describe(&self) -> String {
        self.plane.run(&["describe", "hpa", "kuard-autoscaler"])
    }

    /// What the conditions of the autoscaler say.
    pub(crate) fn conditions(&self) -> Vec<String> {
        let hpa = self.plane.json(&["get", "hpa", "kuard-autoscaler", "-o", "json"]);
        let conditions = hpa["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().filter_map(|it| it["message"].as_str().map(str::to_owned)).collect()
    }

    pub(crate) fn until_described(&self, words: &str) {
        let found = poll(Duration::from_secs(30), || self.conditions().iter().any(|it| it.contains(words)).then_some(()));
        assert!(found.is_some(), "{words:?} is not in\n{}", self.describe());
    }
}
