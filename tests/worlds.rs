//! In random worlds a value is what its samples come to, whichever way it is asked for, with both of Sysdig's APIs.

#[path = "support/prometheus.rs"]
mod prometheus;
mod support;

use std::collections::BTreeMap;
use std::process::Command;

use prometheus::{Prometheus, Samples, missing};
use support::sysdig::Container;
use support::{CLUSTER, Setup, Stage, TOKEN};

/// Two of each: the other of both is there to be left out.
const NAMESPACES: [&str; 2] = ["default", "elsewhere"];
const CLUSTERS: [&str; 2] = [CLUSTER, "other"];
/// Samples reach into the future, so that there are some however long a test takes.
const ONGOING: i64 = -1200;
const VERSIONS: [&str; 2] = ["v1beta1", "v1beta2"];

/// A small generator; its numbers are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What a pod's container tells.
struct Pod {
    cluster: &'static str,
    namespace: &'static str,
    workload: String,
    name: String,
    /// In eighths, which are exact.
    load: f64,
}

/// Up to three workloads of up to four pods in each namespace of each cluster, `kuard` among them. Names repeat.
fn world(random: &mut Random) -> Vec<Pod> {
    let mut pods = Vec::new();
    for (cluster, namespace) in CLUSTERS.iter().flat_map(|cluster| NAMESPACES.map(|namespace| (*cluster, namespace))) {
        for workload in ["kuard", "web", "db"].iter().take(1 + random.below(3) as usize) {
            for index in 0..=random.below(4) {
                let (workload, name) = ((*workload).to_owned(), format!("{workload}-{index}"));
                pods.push(Pod { cluster, namespace, workload, name, load: random.below(8_000_000) as f64 / 8.0 });
            }
        }
    }
    pods
}

/// Kubernetes with what of the world is in this cluster.
fn stage(pods: &[Pod]) -> Stage {
    let stage = Stage::new();
    let mut replicas = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.cluster == CLUSTER) {
        *replicas.entry((pod.namespace, pod.workload.as_str())).or_default() += 1;
    }
    stage.sysdig.world().containers.clear();
    replicas.into_iter().for_each(|((place, name), replicas)| stage.kubernetes.deployment(place, name, replicas));
    stage
}

/// The numbers of some pods come to this.
fn combined(group: &str, loads: &[f64]) -> f64 {
    let sum: f64 = loads.iter().sum();
    match group {
        "sum" => sum,
        "min" => loads.iter().copied().fold(f64::MAX, f64::min),
        "max" => loads.iter().copied().fold(f64::MIN, f64::max),
        _ => sum / loads.len() as f64,
    }
}

/// A quantity as a number.
fn number(text: &str) -> f64 {
    let units = [("n", 1e-9), ("u", 1e-6), ("m", 1e-3), ("k", 1e3), ("M", 1e6)];
    let unit = units.iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?, size)));
    unit.map_or_else(|| text.parse().unwrap(), |(digits, size)| digits.parse::<f64>().unwrap() * size)
}

#[track_caller]
fn close(found: &str, expected: f64, what: &str) {
    // A billionth is the finest that a quantity tells; a double has 15 digits.
    let off = (number(found) - expected).abs();
    assert!(off <= 1e-9 + expected.abs() * 1e-12, "{what}: {found} is not {expected}");
}

/// Asks for `metric` of every object of this cluster in every way there is, and compares with the samples.
fn check(setup: &Setup, pods: &[Pod], metric: &str, round: usize) -> usize {
    let mut asked = 0;
    let mut read = |path: String| {
        asked += 1;
        setup.read(&path).values()
    };
    let mut one = |path: String, expected: f64| {
        let found = read(path.clone());
        assert_eq!(found.len(), 1, "{round} {path}: {found:?}");
        close(found.values().next().unwrap(), expected, &format!("{round} {path}"));
    };
    let here: Vec<&Pod> = pods.iter().filter(|pod| pod.cluster == CLUSTER).collect();
    for (version, place) in VERSIONS.iter().flat_map(|version| NAMESPACES.map(|place| (version, place))) {
        let api = format!("/apis/custom.metrics.k8s.io/{version}");
        let base = format!("{api}/namespaces/{place}");
        let of_place: Vec<&Pod> = here.iter().copied().filter(|pod| pod.namespace == place).collect();
        for group in ["", "avg", "sum", "min", "max"] {
            let tuned = match group {
                "" => String::new(),
                word => format!("?metricLabelSelector=sysdig%2Fgroup-aggregation%3D{word}"),
            };
            let loads: Vec<f64> = of_place.iter().map(|pod| pod.load).collect();
            one(format!("{base}/metrics/{metric}{tuned}"), combined(group, &loads));
            one(format!("{api}/namespaces/{place}/{metric}{tuned}"), combined(group, &loads));
            for workload in ["kuard", "web", "db"] {
                let own = of_place.iter().filter(|pod| pod.workload == workload);
                let loads: Vec<f64> = own.map(|pod| pod.load).collect();
                for object in ["services/", "deployments.apps/", "deployments/", "services/deployment;"] {
                    if !loads.is_empty() {
                        one(format!("{base}/{object}{workload}/{metric}{tuned}"), combined(group, &loads));
                    }
                }
            }
        }
        for pod in &of_place {
            let path = format!("{base}/pods/{}/{metric}", pod.name);
            one(path.clone(), pod.load);
            one(format!("{path}?metricLabelSelector=kube_pod_name%3D{}", pod.name), pod.load);
            one(format!("{path}?metricLabelSelector=kubernetes.pod.name+in+%28{},other%29", pod.name), pod.load);
            // Labels tell one pod of a workload from its siblings.
            let workload = format!("{base}/deployments.apps/{}/{metric}", pod.workload);
            one(format!("{workload}?metricLabelSelector=kubernetes.pod.name%3D{}", pod.name), pod.load);
        }
    }
    for (version, place) in VERSIONS.iter().flat_map(|version| NAMESPACES.map(|place| (version, place))) {
        let base = format!("/apis/custom.metrics.k8s.io/{version}/namespaces/{place}");
        let of_place: Vec<&Pod> = here.iter().copied().filter(|pod| pod.namespace == place).collect();
        for (selector, wanted) in [
            ("", &["kuard", "web", "db"][..]),
            ("?labelSelector=app%3Dkuard", &["kuard"]),
            ("?labelSelector=app%21%3Dkuard", &["web", "db"]),
            ("?labelSelector=app+in+%28kuard%2Cdb%29%2Capp", &["kuard", "db"]),
        ] {
            let chosen: Vec<&&Pod> = of_place.iter().filter(|pod| wanted.contains(&pod.workload.as_str())).collect();
            if chosen.is_empty() {
                continue;
            }
            let found = read(format!("{base}/pods/%2A/{metric}{selector}"));
            assert_eq!(found.len(), chosen.len(), "{round} {base} {selector}: {found:?}");
            for pod in &chosen {
                close(&found[&pod.name], pod.load, &format!("{round} {base} {selector} {}", pod.name));
            }
            let found = read(format!("{base}/deployments.apps/%2A/{metric}{selector}"));
            let names: std::collections::BTreeSet<_> = chosen.iter().map(|pod| &pod.workload).collect();
            assert!(found.keys().eq(names), "{round} {base} {selector}: {found:?}");
            for (name, value) in &found {
                let own = chosen.iter().filter(|pod| pod.workload == *name);
                let loads: Vec<f64> = own.map(|pod| pod.load).collect();
                close(value, combined("avg", &loads), &format!("{round} {base} {selector} {name}"));
            }
        }
    }
    asked
}

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

#[test]
fn with_the_data_api_a_value_is_that_of_its_samples_however_it_is_asked_for() {
    let (mut random, mut asked) = (Random(7), 0);
    for round in 0..5 {
        let pods = world(&mut random);
        let stage = stage(&pods);
        for Pod { cluster, namespace, workload, name, load } in &pods {
            let labels = [
                ("container.name", workload.as_str()),
                ("kubernetes.cluster.name", cluster),
                ("kubernetes.namespace.name", namespace),
                ("kubernetes.pod.name", name),
                ("kubernetes.deployment.name", workload),
                ("kubernetes.service.name", workload),
                ("kubernetes.workload.name", workload),
                ("kubernetes.workload.type", "deployment"),
            ];
            stage.sysdig.world().containers.push(Container::new(&labels, &[("my.load", *load)]));
        }
        let setup = stage.start(binary(), &[]);
        setup.adapter.wait_ready(&setup.client);
        asked += check(&setup, &pods, "my.load", round);
    }
    assert!(asked > 500, "{asked}");
}

#[test]
fn with_promql_a_value_is_that_of_its_samples_however_it_is_asked_for() {
    if let Some(why) = missing() {
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{why}\n"));
        return;
    }
    let (mut random, mut asked) = (Random(5), 0);
    for round in 0..3 {
        let pods = world(&mut random);
        let mut samples = Vec::new();
        for name in ["load", "sysdig_container_up"] {
            for Pod { cluster, namespace, workload, name: pod, load } in &pods {
                let labels = format!(
                    r#"kube_cluster_name="{cluster}",kube_namespace_name="{namespace}",kube_deployment_name="{workload}",kube_workload_type="deployment",kube_workload_name="{workload}",kube_pod_name="{pod}",container_name="{workload}""#
                );
                let first = if name == "load" { *load } else { 1.0 };
                samples.push(Samples { series: format!("{name}{{{labels}}}"), first, step: 0.0, newest: ONGOING });
            }
        }
        let prometheus = Prometheus::start(TOKEN, &samples);
        let settings = [("SDC_ENDPOINT", prometheus.url()), ("SDC_BACKEND", "promql".to_owned())];
        let setup = stage(&pods).start(binary(), &settings);
        setup.adapter.wait_ready(&setup.client);
        asked += check(&setup, &pods, "load", round);
    }
    assert!(asked > 300, "{asked}");
}
