//! Reads in PromQL: the real binary over real TLS, and behind it a real Prometheus that plays Sysdig.

#[path = "support/prometheus.rs"]
mod prometheus;
mod support;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use prometheus::{Prometheus, Samples, missing};
use serde_json::{Value, json};
use support::http::{HttpServer, Reply};
use support::{Setup, Stage, TOKEN, eventually};

const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default";
const REQUESTS: &str = "sysdig_container_net_http_request_count";
/// Samples reach into the future, so that there are some however long a test takes.
const ONGOING: i64 = -1200;

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// True, and a line that says so, if there is no Prometheus here.
fn skipped() -> bool {
    use std::io::Write;
    missing().is_some_and(|why| writeln!(std::io::stderr(), "{why}").is_ok())
}

fn pod(cluster: &str, namespace: &str, workload: &str, pod: &str) -> String {
    format!(
        r#"kube_cluster_name="{cluster}",kube_namespace_name="{namespace}",kube_deployment_name="{workload}",kube_workload_type="deployment",kube_workload_name="{workload}",kube_pod_name="{pod}",container_name="{workload}""#
    )
}

fn series(name: &str, labels: &str, first: f64, step: f64, newest: i64) -> Samples {
    Samples { series: format!("{name}{{{labels}}}"), first, step, newest }
}

/// Three pods with 100, 200 and 300 requests in each 10 s, a queue of 5, 6 and 7, and counters that grow by 20, 40 and
/// 60 in 10 s; `up` each, and the same names in another cluster and another namespace with other numbers.
fn world() -> Vec<Samples> {
    let mut samples = Vec::new();
    for index in 0..3 {
        let (labels, n) = (pod("demo", "default", "kuard", &format!("kuard-{index}")), f64::from(index));
        samples.push(series("sysdig_container_up", &labels, 1.0, 0.0, ONGOING));
        samples.push(series(REQUESTS, &labels, 100.0 * (n + 1.0), 0.0, ONGOING));
        samples.push(series("sysdig_container_cpu_used_percent", &labels, 20.0 + 10.0 * n, 0.0, ONGOING));
        samples.push(series("queue_depth", &labels, 5.0 + n, 0.0, ONGOING));
        samples.push(series("orders_total", &labels, 1000.0, 20.0 * (n + 1.0), ONGOING));
    }
    for (cluster, namespace) in [("other", "default"), ("demo", "elsewhere")] {
        let labels = pod(cluster, namespace, "kuard", "kuard-0");
        samples.push(series("sysdig_container_up", &labels, 1.0, 0.0, ONGOING));
        samples.push(series(REQUESTS, &labels, 77_777.0, 0.0, ONGOING));
        samples.push(series("queue_depth", &labels, 77_777.0, 0.0, ONGOING));
    }
    let node = r#"kube_cluster_name="demo",kube_node_name="worker-1""#;
    samples.push(series("sysdig_host_cpu_used_percent", node, 35.0, 0.0, ONGOING));
    samples
}

/// The adapter with `kuard` of three Ready pods in Kubernetes, and these samples behind it.
fn start(samples: &[Samples], overrides: &[(&str, &str)]) -> (Setup, Prometheus) {
    let prometheus = Prometheus::start(TOKEN, samples);
    let mut all = vec![("SDC_ENDPOINT", prometheus.url()), ("SDC_BACKEND", "promql".to_owned())];
    all.extend(overrides.iter().map(|(name, value)| (*name, (*value).to_owned())));
    let stage = Stage::new();
    stage.kubernetes.object("/api/v1/nodes/worker-1", json!({ "metadata": { "labels": { "pool": "a" } } }));
    let setup = stage.start(binary(), &all);
    setup.adapter.wait_ready(&setup.client);
    (setup, prometheus)
}

#[test]
fn every_kind_of_workload_is_told_by_its_own_label() {
    if skipped() {
        return;
    }
    let kinds = [
        ("deployment", "deployments", "apps/v1", json!({ "readyReplicas": 1 })),
        ("statefulset", "statefulsets", "apps/v1", json!({ "readyReplicas": 1 })),
        ("daemonset", "daemonsets", "apps/v1", json!({ "numberReady": 1 })),
        ("replicaset", "replicasets", "apps/v1", json!({ "readyReplicas": 1 })),
        ("job", "jobs", "batch/v1", json!({ "ready": 1 })),
    ];
    let stage = Stage::new();
    let mut samples = Vec::new();
    for (index, (kind, plural, api_version, status)) in kinds.iter().enumerate() {
        stage.kubernetes.object(&format!("/apis/{api_version}/namespaces/default/{plural}/db"), json!({ "status": status }));
        let labels = format!(
            r#"kube_cluster_name="demo",kube_namespace_name="default",kube_{kind}_name="db",kube_workload_type="{kind}",kube_workload_name="db",kube_pod_name="db-{kind}",container_name="db""#
        );
        samples.push(series("sysdig_container_up", &labels, 1.0, 0.0, ONGOING));
        samples.push(series("queue_depth", &labels, 1.0 + index as f64, 0.0, ONGOING));
    }
    let prometheus = Prometheus::start(TOKEN, &samples);
    let settings = [("SDC_ENDPOINT", prometheus.url()), ("SDC_BACKEND", "promql".to_owned())];
    let setup = stage.start(binary(), &settings);
    setup.adapter.wait_ready(&setup.client);
    for (index, (kind, plural, api_version, _)) in kinds.iter().enumerate() {
        let (group, expected) = (api_version.split('/').next().unwrap(), (index + 1).to_string());
        for object in [format!("{plural}.{group}/db"), format!("{plural}/db"), format!("services/{kind};db")] {
            for sum in ["", "?metricLabelSelector=sysdig%2Fgroup-aggregation%3Dsum"] {
                assert_eq!(setup.read(&format!("{BASE}/{object}/queue_depth{sum}")).value(), expected, "{object}{sum}");
            }
        }
    }
}

#[test]
fn what_prometheus_scrapes_of_an_exporter_is_read() {
    if skipped() {
        return;
    }
    let up = pod("demo", "default", "kuard", "kuard-0");
    let text = format!("sysdig_container_up{{{up}}} 1\nqueue_depth{{{up}}} 7\n");
    let exporter = HttpServer::start(None, move |_| Reply::typed(200, "text/plain; version=0.0.4", text.clone()));
    let prometheus = Prometheus::scraping(TOKEN, &format!("127.0.0.1:{}", exporter.port()));
    let settings = [("SDC_ENDPOINT", prometheus.url()), ("SDC_BACKEND", "promql".to_owned())];
    let setup = Stage::new().start(binary(), &settings);
    setup.adapter.wait_ready(&setup.client);
    let path = format!("{BASE}/pods/kuard-0/queue_depth");
    // A window ends at least ten seconds ago, so the first samples count later.
    eventually("there are samples in a finished window", Duration::from_secs(90), || setup.read(&path).status == 200);
    assert_eq!(setup.read(&path).value(), "7");
    drop(exporter);
    eventually("what is not scraped any more is refused", Duration::from_secs(300), || setup.read(&path).status != 200);
    assert_eq!(setup.read(&path).refusal().1, "no-data");
}

#[test]
fn every_object_and_aggregation_has_the_value_that_its_samples_have() {
    if skipped() {
        return;
    }
    let (setup, prometheus) = start(&world(), &[]);
    let tuned = |key: &str, value: &str| format!("?metricLabelSelector=sysdig%2F{key}%3D{value}");
    let sum = tuned("group-aggregation", "sum");
    let table = [
        // 100, 200 and 300 in each 10 s are 10, 20 and 30 a second.
        ("services/kuard/net.http.request.count".to_owned(), "20"),
        ("services/deployment;kuard/net.http.request.count".to_owned(), "20"),
        ("deployments.apps/kuard/net.http.request.count".to_owned(), "20"),
        ("pods/kuard-2/net.http.request.count".to_owned(), "30"),
        ("metrics/net.http.request.count".to_owned(), "20"),
        (format!("services/kuard/{REQUESTS}"), "20"),
        (format!("services/kuard/net.http.request.count{sum}"), "60"),
        (format!("deployments/kuard/net.http.request.count{sum}"), "60"),
        (format!("metrics/net.http.request.count{sum}"), "60"),
        (format!("services/kuard/net.http.request.count{}", tuned("group-aggregation", "max")), "30"),
        (format!("services/kuard/net.http.request.count{}", tuned("group-aggregation", "min")), "10"),
        (format!("pods/kuard-0/net.http.request.count{}", tuned("time-aggregation", "timeAvg")), "10"),
        (format!("pods/kuard-0/net.http.request.count{}", tuned("time-aggregation", "sum")), "600"),
        (format!("pods/kuard-0/net.http.request.count{}", tuned("time-aggregation", "max")), "100"),
        (format!("pods/kuard-0/net.http.request.count{}", tuned("window", "2m")), "10"),
        ("services/kuard/cpu.used.percent".to_owned(), "30"),
        ("pods/kuard-0/cpu.used.percent".to_owned(), "20"),
        ("services/kuard/queue_depth".to_owned(), "6"),
        (format!("services/kuard/queue_depth{sum}"), "18"),
        // A counter that grows by 20, 40 and 60 in 10 s.
        ("services/kuard/orders_total".to_owned(), "4"),
        (format!("services/kuard/orders_total{sum}"), "12"),
        ("pods/kuard-1/orders_total".to_owned(), "4"),
        ("pods/kuard-1/queue_depth?metricLabelSelector=container_name%3Dkuard".to_owned(), "6"),
        ("pods/kuard-1/queue_depth?metricLabelSelector=container.name%3Dkuard".to_owned(), "6"),
    ];
    for (rest, expected) in table {
        assert_eq!(setup.read(&format!("{BASE}/{rest}")).value(), expected, "{rest}");
        let older = BASE.replace("v1beta2", "v1beta1");
        assert_eq!(setup.read(&format!("{older}/{rest}")).value(), expected, "{rest} in v1beta1");
    }
    let api = "/apis/custom.metrics.k8s.io/v1beta2";
    assert_eq!(setup.read(&format!("{api}/nodes/worker-1/cpu.used.percent")).value(), "35");
    let nodes = setup.read(&format!("{api}/nodes/%2A/cpu.used.percent?labelSelector=pool%3Da")).values();
    assert_eq!(nodes, BTreeMap::from([("worker-1".to_owned(), "35".to_owned())]));
    assert_eq!(setup.read(&format!("{api}/namespaces/default/net.http.request.count")).value(), "20");
    for (method, query) in prometheus.queries() {
        assert!(method == "GET" || query.len() > 500, "{method} {query}");
        assert!(!query.contains("{kube_namespace"), "every selector begins with the cluster: {query}");
    }
}

#[test]
fn without_an_aggregation_each_container_must_have_one_series() {
    if skipped() {
        return;
    }
    let mut samples = world();
    for index in 0..3 {
        let labels = pod("demo", "default", "kuard", &format!("kuard-{index}"));
        for (code, load) in [("200", 30.0), ("500", 6.0)] {
            let labels = format!(r#"{labels},code="{code}""#);
            samples.push(series("my_requests", &labels, load, 0.0, ONGOING));
        }
        // Another container with one series of its own.
        let proxy = labels.replace(r#"container_name="kuard""#, r#"container_name="proxy""#);
        samples.push(series("queue_depth", &proxy, 1.0, 0.0, ONGOING));
    }
    for (pod_name, code) in [("kuard-0", "200"), ("kuard-0", "500"), ("kuard-1", "200"), ("kuard-2", "200")] {
        let labels = format!(r#"{},code="{code}""#, pod("demo", "default", "kuard", pod_name));
        samples.push(series("my_errors", &labels, 30.0, 0.0, ONGOING));
    }
    for (instance, load) in [("10.0.0.1:80", 10.0), ("10.0.0.2:80", 30.0)] {
        for index in 0..3 {
            let labels = pod("demo", "default", "kuard", &format!("kuard-{index}"));
            let labels = format!(r#"{labels},instance="{instance}""#);
            samples.push(series("my_restarts", &labels, load, 0.0, ONGOING));
        }
    }
    let (setup, _prometheus) = start(&samples, &[]);
    for place in ["services/kuard", "deployments.apps/kuard", "pods/kuard-1", "metrics"] {
        let read = |selector: &str| setup.read(&format!("{BASE}/{place}/my_requests{selector}"));
        let (code, word, message) = read("").refusal();
        assert_eq!((code, word.as_str()), (422, "ambiguous"), "{place}: {message}");
        assert!(message.contains(r#"differ in code ("200", "500"): select one"#), "{place}: {message}");
        assert_eq!(read("?metricLabelSelector=code%3D200").value(), "30", "{place}");
        let per_pod = if place.starts_with("pods") { "36" } else { "108" };
        let sum = read("?metricLabelSelector=sysdig%2Fgroup-aggregation%3Dsum");
        assert_eq!(sum.value(), per_pod, "{place}");
        assert_eq!(read("?metricLabelSelector=sysdig%2Fgroup-aggregation%3Davg").value(), "18", "{place}");
    }
    // A Service is its pods', and not the average of those that happen to be told apart.
    for place in ["services/kuard", "deployments.apps/kuard"] {
        let (code, word, message) = setup.read(&format!("{BASE}/{place}/my_errors")).refusal();
        assert_eq!((code, word.as_str()), (422, "ambiguous"), "{place}: {message}");
        let restarted = setup.read(&format!("{BASE}/{place}/my_restarts"));
        assert_eq!(restarted.value(), "20", "{place}: of before and after a restart");
    }
    // Of 6 and 1, as the old adapter averages over containers.
    assert_eq!(setup.read(&format!("{BASE}/pods/kuard-1/queue_depth")).value(), "3500m");
}

#[test]
fn what_went_silent_within_a_long_window_is_as_old_as_it_is() {
    if skipped() {
        return;
    }
    let labels = pod("demo", "default", "kuard", "kuard-0");
    let samples: Vec<_> = [30, 200, 400]
        .map(|silent| series(&format!("queue_silent_for_{silent}"), &labels, 5.0, 0.0, silent))
        .into_iter()
        .chain([series("sysdig_container_up", &labels, 1.0, 0.0, ONGOING)])
        .collect();
    let (setup, _prometheus) = start(&samples, &[]);
    let read = |silent: u64| {
        let window = "metricLabelSelector=sysdig%2Fwindow%3D10m";
        setup.read(&format!("{BASE}/pods/kuard-0/queue_silent_for_{silent}?{window}"))
    };
    assert_eq!(read(30).value(), "5");
    for silent in [200, 400] {
        let (code, word, message) = read(silent).refusal();
        assert_eq!((code, word.as_str()), (503, "too-old"), "{silent}: {message}");
    }
}

#[test]
fn of_many_pods_each_has_its_own_value_in_one_query() {
    if skipped() {
        return;
    }
    let (setup, prometheus) = start(&world(), &[]);
    let finished = json!({ "metadata": { "labels": { "app": "kuard" } }, "status": { "phase": "Succeeded" } });
    setup.kubernetes.object("/api/v1/namespaces/default/pods/kuard-1", finished);
    let before = prometheus.queries().len();
    let found = setup.read(&format!("{BASE}/pods/%2A/net.http.request.count?labelSelector=app%3Dkuard")).values();
    let expected = [("kuard-0", "10"), ("kuard-2", "30")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(found, BTreeMap::from(expected), "a finished pod is left out");
    assert_eq!(prometheus.queries().len(), before + 1);
    let (code, word, message) = setup.read(&format!("{BASE}/pods/%2A/queue_depth?labelSelector=app%3Dnope")).refusal();
    assert_eq!((code, word.as_str()), (404, "object-not-found"), "{message}");
    let (code, _, message) = setup.read(&format!("{BASE}/services/%2A/queue_depth")).refusal();
    assert_eq!(code, 400, "{message}");
    for index in 0..80 {
        let path = format!("/api/v1/namespaces/default/pods/a-pod-with-a-very-long-name-{index:03}");
        setup.kubernetes.object(&path, json!({ "metadata": { "labels": { "app": "kuard" } } }));
    }
    let found = setup.read(&format!("{BASE}/pods/%2A/net.http.request.count?labelSelector=app%3Dkuard")).values();
    assert_eq!(found.len(), 2, "pods without samples have no item");
    let (method, query) = prometheus.queries().pop().unwrap();
    assert_eq!(method, "POST", "{} bytes", query.len());
}

#[test]
fn silence_is_zero_only_for_what_counts_changes_and_only_with_proof() {
    if skipped() {
        return;
    }
    let labels = |index| pod("demo", "default", "kuard", &format!("kuard-{index}"));
    let up = |index| series("sysdig_container_up", &labels(index), 1.0, 0.0, ONGOING);
    // Silent since five minutes ago.
    let silent = |name: &str| series(name, &labels(0), 50.0, 0.0, 300);
    let mut samples = vec![up(0), up(1), silent(REQUESTS), silent("queue_depth"), silent("orders_total")];
    let (setup, _prometheus) = start(&samples, &[]);
    let reads = |setup: &Setup, rest: &str| setup.read(&format!("{BASE}/{rest}")).refusal();
    let (_, word, message) = reads(&setup, "services/kuard/net.http.request.count");
    assert_eq!(word, "partly-seen", "{message}");
    assert!(message.contains("for Pod kuard-2 in namespace default"), "the pod that is not seen: {message}");
    samples.push(up(2));
    let (setup, _prometheus) = start(&samples, &[]);
    assert_eq!(setup.read(&format!("{BASE}/services/kuard/net.http.request.count")).value(), "0");
    assert_eq!(setup.read(&format!("{BASE}/pods/kuard-0/net.http.request.count")).value(), "0");
    for (rest, expected) in [
        ("services/kuard/net.http.error.count", "metric-not-collected"),
        ("services/kuard/queue_depth", "no-data"),
        ("services/kuard/orders_total", "no-data"),
        ("services/kuard/cpu.used.percent", "no-data"),
        ("services/kuard/no_such_metric", "no-data"),
        ("services/kuard/queue_depth?metricLabelSelector=sysdig%2Fwindow%3D10m", "too-old"),
    ] {
        let (_, word, message) = reads(&setup, rest);
        assert_eq!(word, expected, "{rest}: {message}");
    }
}

#[test]
fn a_value_that_is_none_is_refused_by_its_own_word() {
    if skipped() {
        return;
    }
    let labels = pod("demo", "default", "kuard", "kuard-0");
    let numbers = [("a", f64::NAN), ("b", f64::INFINITY), ("c", 1e300), ("d", -2.5), ("e", 1e-12)];
    let mut samples: Vec<Samples> =
        numbers.iter().map(|(name, number)| series(&format!("odd_{name}"), &labels, *number, 0.0, ONGOING)).collect();
    samples.push(series("sysdig_container_up", &labels, 1.0, 0.0, ONGOING));
    let (setup, _prometheus) = start(&samples, &[]);
    for (name, expected) in [("a", "not-finite"), ("b", "not-finite"), ("c", "out-of-range")] {
        let (code, word, message) = setup.read(&format!("{BASE}/pods/kuard-0/odd_{name}")).refusal();
        assert_eq!((code, word.as_str()), (422, expected), "{message}");
    }
    assert_eq!(setup.read(&format!("{BASE}/pods/kuard-0/odd_d")).value(), "-2500m");
    assert_eq!(setup.read(&format!("{BASE}/pods/kuard-0/odd_e")).value(), "1n");
    for metric in ["jvm.heap.used", "net.http.nope"] {
        let (code, _, message) = setup.read(&format!("{BASE}/pods/kuard-0/{metric}")).refusal();
        assert_eq!(code, 400, "{message}");
        assert!(message.contains("no name in PromQL that is safe to assume"), "{message}");
    }
}

#[test]
fn every_error_of_sysdigs_has_its_word_and_a_part_of_an_answer_is_none() {
    if skipped() {
        return;
    }
    let (setup, prometheus) = start(&world(), &[]);
    let vector = |result: Value| json!({ "status": "success", "data": { "resultType": "vector", "result": result } });
    let mut cut = vector(json!([]));
    cut["warnings"] = json!(["result was truncated to 1000 series"]);
    let part = |part: &str, value: &str| json!([{ "metric": { "sysdig_metrics_adapter": part, "kube_namespace_name": "default", "kube_pod_name": "kuard-0" }, "value": [1, value] }]);
    let error = |text: &str| json!({ "status": "error", "errorType": "bad_data", "error": text });
    let html = "<html>Sign in to this network</html>";
    let table = [
        (Reply::json(400, &error("parse error")), "backend-rejected", "parse error"),
        (Reply::json(401, &json!({ "timestamp": 1, "status": 401, "error": "Unauthorized" })), "backend-unauthorized", ""),
        (Reply::json(403, &json!({ "message": "Access is denied" })), "backend-forbidden", "Access is denied"),
        (Reply::text(404, "404 page not found"), "backend-rejected", "404 page not found"),
        (Reply::json(410, &error("gone")), "backend-rejected", "gone"),
        (Reply::json(422, &error("too many metrics")), "backend-rejected", "too many metrics"),
        (Reply::json(500, &error("internal")), "backend-error", "internal"),
        (Reply::typed(502, "text/html", html), "backend-error", "Sign in"),
        (Reply::typed(200, "text/html", html), "backend-invalid-answer", "JSON"),
        (Reply::json(200, &cut), "backend-invalid-answer", "truncated to 1000 series"),
        (
            Reply::json(200, &json!({ "status": "success", "data": { "resultType": "scalar" } })),
            "backend-invalid-answer",
            "vector",
        ),
        (Reply::json(200, &vector(part("more", "1"))), "backend-invalid-answer", "not asked for"),
        (Reply::json(200, &vector(json!([part("value", "1")[0], part("value", "2")[0]]))), "backend-invalid-answer", ""),
        (Reply::json(200, &vector(json!([]))), "no-data", "kuard-0"),
        (Reply::json(200, &vector(part("value", "one"))), "not-finite", ""),
        (Reply::Reset, "backend-unreachable", ""),
        (Reply::Truncate, "backend-invalid-answer", ""),
        (Reply::json(429, &json!({ "type": "t", "message": "slow down", "details": [] })), "backend-rate-limited", ""),
    ];
    for (reply, expected, says) in table {
        prometheus.reply(Some(reply.clone()));
        let (_, word, message) = setup.read(&format!("{BASE}/pods/kuard-0/queue_depth")).refusal();
        assert_eq!(word, expected, "{reply:?}: {message}");
        assert!(message.contains(says) && !message.contains(TOKEN), "{reply:?}: {message}");
    }
    prometheus.reply(None);
    let read = || setup.read(&format!("{BASE}/pods/kuard-0/queue_depth"));
    eventually("the limit of the rate is over", Duration::from_secs(40), || read().status == 200);
    assert_eq!(read().value(), "5");
}

#[test]
fn the_backend_follows_the_metric_unless_it_is_chosen() {
    if skipped() {
        return;
    }
    let (setup, prometheus) = start(&world(), &[("SDC_BACKEND", "auto")]);
    assert_eq!(setup.read(&format!("{BASE}/services/kuard/queue_depth")).value(), "6");
    let asked = prometheus.queries().len();
    let (code, word, message) = setup.read(&format!("{BASE}/services/kuard/net.http.request.count")).refusal();
    assert_eq!((code, word.as_str()), (404, "backend-rejected"), "this Sysdig has no Data API: {message}");
    assert_eq!(prometheus.queries().len(), asked);
    let (setup, _prometheus) = start(&world(), &[]);
    setup.adapter.wait_log("listening");
    let list = "/apis/custom.metrics.k8s.io/v1beta2";
    eventually("discovery lists the names of PromQL", Duration::from_secs(10), || {
        setup.read(list).json()["resources"].as_array().unwrap().iter().any(|it| it["name"] == "services/queue_depth")
    });
}
