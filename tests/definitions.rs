//! Metrics that the operator defines in a file, through the real binary.

#[path = "support/prometheus.rs"]
mod prometheus;
mod support;

use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use prometheus::{Prometheus, Samples, missing};
use serde_json::{Value, json};
use support::{CLUSTER, METRIC, Response, Setup, Stage, TOKEN, eventually};

const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default";
const FILE: &str = "metrics.json";
/// The file is read every ten seconds.
const REREAD: Duration = Duration::from_secs(30);
/// Until a value that was fresh is too old for the shortest bound here.
const AGED: Duration = Duration::from_secs(60);
/// Samples reach into the future, so that there are some however long a test takes.
const ONGOING: i64 = -1200;

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// The adapter with that file.
fn start(stage: Stage, file: &str, overrides: &[(&'static str, String)]) -> Setup {
    let path = stage.dir.write(FILE, file).display().to_string();
    let overrides = [overrides, &[("CONFIG_FILE", path)]].concat();
    let setup = stage.start(binary(), &overrides);
    setup.adapter.wait_ready(&setup.client);
    setup
}

fn file(metrics: &Value) -> String {
    json!({ "metrics": metrics }).to_string()
}

fn read(setup: &Setup, rest: &str) -> Response {
    setup.read(&format!("{BASE}/{rest}"))
}

/// `kuard` with 50, 60 and 70 requests, `web` with 7 of two pods, in another namespace `app` with 100 of two pods;
/// and the same in another cluster.
fn stage() -> Stage {
    let stage = Stage::new();
    stage.deployment("default", "web", 2, &[(METRIC, 7.0)]);
    stage.deployment("elsewhere", "app", 2, &[(METRIC, 100.0)]);
    let mut world = stage.sysdig.world();
    world.deployment("other", "default", "kuard", Some("kuard"), 3, &[(METRIC, 9000.0)]);
    for (index, container) in world.containers_of("default", "kuard").take(3).enumerate() {
        container.metrics.insert(METRIC.to_owned(), (50.0 + 10.0 * index as f64).into());
    }
    drop(world);
    stage
}

#[test]
fn a_name_stands_for_an_id_with_its_selector_and_tuning() {
    let metrics = json!([
        { "name": "requests", "metric": METRIC, "description": "load" },
        { "name": "requests_of_one", "metric": METRIC, "selector": "kubernetes.pod.name=kuard-1" },
        { "name": "requests_of_some", "metric": METRIC, "selector": "kubernetes.pod.name in (kuard-1,kuard-2)" },
        { "name": "requests_of_others", "metric": METRIC, "selector": "kubernetes.pod.name notin (kuard-2)" },
        { "name": "requests_sum", "metric": METRIC, "selector": "sysdig/group-aggregation=sum" },
        { "name": "requests_max", "metric": METRIC, "selector": "sysdig/group-aggregation=max" },
        { "name": "requests_share", "metric": METRIC, "selector": "sysdig/group-aggregation=sum", "divideBy": 7, "decimals": 2 },
        { "name": "requests_tiny", "metric": METRIC, "divideBy": 1_000_000, "decimals": 2 },
        { "name": "requests:k", "metric": METRIC, "divideBy": 1000 },
    ]);
    let setup = start(stage(), &file(&metrics), &[]);
    for (name, expected) in [
        ("requests", "60"),
        ("requests_of_one", "60"),
        ("requests_of_some", "65"),
        ("requests_of_others", "55"),
        ("requests_sum", "180"),
        ("requests_max", "70"),
        ("requests_share", "25710m"),
        // What is not zero is not rounded to zero.
        ("requests_tiny", "10m"),
        ("requests:k", "60m"),
        (METRIC, "60"),
    ] {
        for object in ["services/kuard", "deployments.apps/kuard", "services/deployment;kuard"] {
            assert_eq!(read(&setup, &format!("{object}/{name}")).value(), expected, "{object} {name}");
        }
    }
    // A caller's selector comes on top, and never in place.
    let both = "requests_of_some?metricLabelSelector=kubernetes.pod.name%3Dkuard-2%2Csysdig%2Fgroup-aggregation%3Dsum";
    assert_eq!(read(&setup, &format!("services/kuard/{both}")).value(), "70");
    // Of settings the caller's wins.
    let max = "requests_sum?metricLabelSelector=sysdig%2Fgroup-aggregation%3Dmax";
    assert_eq!(read(&setup, &format!("services/kuard/{max}")).value(), "70");
    let response = read(&setup, "services/kuard/requests_of_one?metricLabelSelector=kubernetes.pod.name%3Dkuard-2");
    assert_eq!(response.refusal().1, "no-data", "nothing is both");
    let all = read(&setup, "pods/*/requests_share?labelSelector=app%3Dkuard").values();
    assert_eq!(all["kuard-0"], "7140m");
    let list = read(&setup, "services/kuard/requests").json();
    assert_eq!(list["items"][0]["metric"]["name"], "requests", "it is called as it was asked for");
    let names = setup.read("/apis/custom.metrics.k8s.io/v1beta2").text();
    assert!(names.contains("services/requests_share") && names.contains("pods/requests:k"), "{names}");
}

#[test]
fn a_scope_is_the_object_its_namespace_or_the_cluster() {
    let metrics = json!([
        { "name": "of_object", "metric": METRIC, "scope": "workload" },
        { "name": "of_namespace", "metric": METRIC, "scope": "namespace" },
        { "name": "of_cluster", "metric": METRIC, "scope": "cluster" },
        { "name": "sum_of_namespace", "metric": METRIC, "scope": "namespace", "selector": "sysdig/group-aggregation=sum" },
        { "name": "sum_of_cluster", "metric": METRIC, "scope": "cluster", "selector": "sysdig/group-aggregation=sum" },
    ]);
    let setup = start(stage(), &file(&metrics), &[]);
    let table = [
        ("of_object", "60", "7"),
        ("of_namespace", "38800m", "38800m"),
        ("sum_of_namespace", "194", "194"),
        ("sum_of_cluster", "394", "394"),
    ];
    for (name, of_kuard, of_web) in table {
        assert_eq!(read(&setup, &format!("services/kuard/{name}")).value(), of_kuard, "{name}");
        assert_eq!(read(&setup, &format!("deployments.apps/web/{name}")).value(), of_web, "{name}");
    }
    let elsewhere = BASE.replace("default", "elsewhere");
    assert_eq!(setup.read(&format!("{elsewhere}/services/app/of_namespace")).value(), "100");
    assert_eq!(setup.read(&format!("{elsewhere}/services/app/sum_of_cluster")).value(), "394");
    for query in setup.sysdig.queries() {
        let filter = query["filter"].as_str().unwrap();
        assert!(filter.starts_with(&format!("kubernetes.cluster.name = '{CLUSTER}'")), "{filter}");
    }
}

#[test]
fn absence_is_an_error_or_zero_or_the_last_value_for_a_while() {
    let bounds = json!({ "maxAge": "25s", "metric": METRIC });
    let with = |name: &str, absence: Value| {
        let mut entry = bounds.clone();
        (entry["name"], entry["absence"]) = (json!(name), absence);
        entry
    };
    let metrics = json!([with("plain", json!("error")), with("idle", json!("zero")), with("held", json!("hold 10m"))]);
    let setup = start(stage(), &file(&metrics), &[("REFRESH_INTERVAL", "1s".to_owned())]);
    let ask = |name: &str| read(&setup, &format!("services/kuard/{name}"));
    for name in ["plain", "idle", "held", "plain", "idle", "held"] {
        assert_eq!(ask(name).value(), "60", "{name}");
    }
    setup.sysdig.world().remove_workload("default", "kuard");
    let stamp = |response: &Response| response.json()["items"][0]["timestamp"].as_str().unwrap().to_owned();
    eventually("without a sample there is no value", AGED, || ask("plain").status != 200);
    let (code, word, message) = ask("plain").refusal();
    assert_eq!((code, word.as_str()), (404, "no-data"), "{message}");
    let held = ask("held");
    assert_eq!(held.value(), "60", "older than its age, and held");
    eventually("silence is zero", AGED, || ask("idle").value() == "0");
    eventually("zero goes on", AGED, || {
        let response = ask("idle");
        response.value() == "0" && stamp(&response) > stamp(&held)
    });
    assert_eq!(stamp(&ask("held")), stamp(&held), "what is held keeps its time");
}

#[test]
fn absence_is_zero_where_there_is_no_data_and_never_where_something_is_not_known() {
    let metrics = json!([
        { "name": "load", "metric": METRIC, "absence": "zero" },
        { "name": "load_sum", "metric": METRIC, "absence": "zero", "selector": "sysdig/group-aggregation=sum" },
        { "name": "load_of_all", "metric": METRIC, "absence": "zero", "scope": "cluster", "selector": "agent.id=none" },
        { "name": "errors", "metric": "my.errors", "absence": "zero" },
    ]);
    let stage = stage();
    stage.sysdig.world().describe("my.errors", "counter");
    stage.kubernetes.deployment("default", "unseen", 2);
    let setup = start(stage, &file(&metrics), &[]);
    for (rest, expected) in [
        ("services/kuard/load_sum", "180"),
        ("services/unseen/load", "0"),
        ("deployments.apps/unseen/load_sum", "0"),
        ("services/kuard/load_of_all", "0"),
    ] {
        assert_eq!(read(&setup, rest).value(), expected, "{rest}: the operator says so");
    }
    // An id that nothing in the cluster ever had is a mistake rather than silence.
    assert_eq!(read(&setup, "services/kuard/errors").refusal().1, "metric-not-collected");
    // One of the pods is not seen any more, so the sum is not known. It is not zero.
    setup.sysdig.world().containers_of("default", "kuard").next().unwrap().labels.clear();
    let (_, word, message) = read(&setup, "services/kuard/load_sum").refusal();
    assert_eq!(word, "partly-seen", "{message}");
    assert!(message.contains("2 of its 3 ready pods"), "{message}");
    setup.sysdig.fail(support::sysdig::Fault::Status(500));
    for rest in ["services/kuard/load", "services/unseen/load", "services/kuard/load_of_all"] {
        assert_eq!(read(&setup, rest).refusal().1, "backend-error", "{rest}");
    }
    setup.sysdig.heal();
    assert_eq!(read(&setup, "services/nope/load").refusal().1, "object-not-found");
}

/// Three pods whose requests take up to 0.1 s in half of the cases and up to 0.5 s in the others, as a histogram; one that
/// is asked nothing; a queue that two exporters measure.
fn histogram() -> Vec<Samples> {
    let mut samples = Vec::new();
    let mut series = |name: &str, labels: &str, first: f64, step: f64| {
        samples.push(Samples { series: format!("{name}{{{labels}}}"), first, step, newest: ONGOING });
    };
    for (cluster, namespace, factor) in [("demo", "default", 1.0), ("other", "default", 50.0), ("demo", "elsewhere", 9.0)] {
        for index in 0..3 {
            let labels = format!(
                r#"kube_cluster_name="{cluster}",kube_namespace_name="{namespace}",kube_deployment_name="kuard",kube_workload_type="deployment",kube_workload_name="kuard",kube_pod_name="kuard-{index}""#
            );
            series("sysdig_container_up", &labels, 1.0, 0.0);
            for (le, step) in [("0.1", 10.0), ("0.5", 10.0 + 10.0 * factor), ("+Inf", 10.0 + 10.0 * factor)] {
                series("http_seconds_bucket", &format!("{labels},le=\"{le}\""), 100.0, step);
            }
            for (code, step) in [("200", 30.0), ("500", 10.0 * factor)] {
                series("http_requests_total", &format!("{labels},code=\"{code}\""), 100.0, step);
            }
        }
    }
    let labels = |name: &str| {
        format!(
            r#"kube_cluster_name="demo",kube_namespace_name="default",kube_deployment_name="{name}",kube_pod_name="{name}-0""#
        )
    };
    series("sysdig_container_up", &labels("idle"), 1.0, 0.0);
    for le in ["0.1", "0.5", "+Inf"] {
        series("http_seconds_bucket", &format!("{},le=\"{le}\"", labels("idle")), 100.0, 0.0);
    }
    for (name, length) in [("exporter", 4.0), ("spare", 6.0)] {
        series("queue_length", &labels(name), length, 0.0);
    }
    samples
}

#[test]
fn a_template_in_promql_is_asked_within_its_scope() {
    if let Some(why) = missing() {
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{why}\n"));
        return;
    }
    let quantile = |quantile: &str| {
        format!("histogram_quantile({quantile}, sum by (le, $by) (rate(http_seconds_bucket{{$matchers}}[$window])))")
    };
    let share = "sum by ($by) (rate(http_requests_total{$matchers,code=\"500\"}[$window])) / \
                 sum by ($by) (rate(http_requests_total{$matchers}[$window]))";
    let metrics = json!([
        { "name": "latency_p50", "metric": quantile("0.5"), "decimals": 3 },
        { "name": "latency_p99", "metric": quantile("0.99"), "decimals": 3 },
        { "name": "latency_p99_ns", "metric": quantile("0.99"), "decimals": 3, "scope": "namespace" },
        { "name": "latency_p50_all", "metric": quantile("0.5"), "decimals": 3, "scope": "cluster" },
        { "name": "failing", "metric": share, "decimals": 4 },
        { "name": "failing_of_all", "metric": share, "decimals": 4, "scope": "cluster", "selector": "sysdig/window=2m" },
        { "name": "successes", "metric": "sum by ($by) (increase(http_requests_total{$matchers}[$window]))",
          "selector": "code=200,sysdig/window=2m", "decimals": 0, "divideBy": 2 },
        { "name": "latency_or_none", "metric": format!("{} >= 0", quantile("0.5")) },
        { "name": "latency_or_zero", "metric": format!("{} >= 0", quantile("0.5")), "absence": "zero" },
        { "name": "longest", "metric": "queue_length", "scope": "cluster", "selector": "sysdig/group-aggregation=max" },
        { "name": "mean", "metric": "queue_length", "scope": "cluster" },
        { "name": "many", "metric": "rate(http_requests_total{$matchers}[$window]) * on ($by) group_left () \
                                     sum by ($by) (rate(http_requests_total{$matchers}[$window]))" },
    ]);
    let prometheus = Prometheus::start(TOKEN, &histogram());
    let stage = stage();
    stage.kubernetes.deployment("default", "idle", 1);
    let settings = [("SDC_ENDPOINT", prometheus.url()), ("EXTERNAL_METRICS", "true".to_owned())];
    let setup = start(stage, &file(&metrics), &settings);
    for (name, expected) in [
        ("latency_p50", "100m"),
        // 98 % of the way from 0.1 s to 0.5 s.
        ("latency_p99", "492m"),
        ("latency_p99_ns", "492m"),
        // 60 of 360 a second take up to 0.1 s, so that half of them take 0.4 of the way to 0.5 s.
        ("latency_p50_all", "260m"),
        ("failing", "250m"),
        // Three pods with 1 of 4 a second, three with 9 of 12.
        ("failing_of_all", "625m"),
    ] {
        for object in ["deployments.apps/kuard", "pods/kuard-1", "services/kuard", "services/deployment;kuard"] {
            assert_eq!(read(&setup, &format!("{object}/{name}")).value(), expected, "{object} {name}");
        }
    }
    // 30 in each 10 s for 2 minutes, of three pods or of one.
    assert_eq!(read(&setup, "deployments.apps/kuard/successes").value(), "540");
    assert_eq!(read(&setup, "pods/kuard-0/successes").value(), "180");
    let elsewhere = BASE.replace("default", "elsewhere");
    assert_eq!(setup.read(&format!("{elsewhere}/metrics/failing")).value(), "750m");
    // Objects of one query have the values that each has alone.
    let all = read(&setup, "pods/%2A/failing?labelSelector=app%3Dkuard").values();
    assert_eq!(all, [0, 1, 2].map(|index| (format!("kuard-{index}"), "250m".to_owned())).into());
    for (name, expected) in [("longest", "6"), ("mean", "5")] {
        assert_eq!(read(&setup, &format!("deployments.apps/kuard/{name}")).value(), expected, "{name}");
    }
    let external = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default";
    for (name, expected) in [("failing", "250m"), ("failing_of_all", "625m"), ("longest", "6")] {
        let list = setup.read(&format!("{external}/{name}")).json();
        assert_eq!((&list["items"][0]["value"], list["items"].as_array().map(Vec::len)), (&json!(expected), Some(1)), "{list}");
    }
    // Of no request there is no percentile.
    for (name, expected) in [("latency_p50", (422, "not-finite")), ("latency_or_none", (404, "no-data"))] {
        let (code, word, message) = read(&setup, &format!("deployments.apps/idle/{name}")).refusal();
        assert_eq!((code, word.as_str()), expected, "{message}");
    }
    assert_eq!(read(&setup, "deployments.apps/idle/latency_or_zero").value(), "0");
    assert_eq!(read(&setup, "deployments.apps/kuard/latency_or_zero").value(), "100m");
    let (code, word, message) = read(&setup, "pods/kuard-0/many").refusal();
    assert_eq!((code, word.as_str()), (422, "ambiguous"), "{message}");
    assert!(message.contains("code (\"200\", \"500\")"), "{message}");
    let queries = prometheus.queries();
    assert!(!queries.is_empty());
    for (_, query) in queries {
        let selectors = query.matches('{').count();
        assert_eq!(query.matches("{kube_cluster_name=~\"demo\"").count(), selectors, "{query}");
        assert!(!query.contains('$'), "{query}");
    }
}

#[test]
fn prometheus_understands_every_example_of_the_documents() {
    if let Some(why) = missing() {
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{why}\n"));
        return;
    }
    let document = include_str!("../docs/definitions.md");
    let examples = document.split("\n```json\n").skip(1).filter_map(|it| it.split("\n```").next());
    let examples: Vec<Value> = examples.map(|it| serde_json::from_str(it).unwrap()).collect();
    let metrics: Vec<Value> = examples.iter().flat_map(|it| it["metrics"].as_array().unwrap().clone()).collect();
    let prometheus = Prometheus::start(TOKEN, &histogram());
    let settings = [("SDC_ENDPOINT", prometheus.url()), ("SDC_BACKEND", "promql".to_owned())];
    let setup = start(stage(), &file(&json!(metrics)), &settings);
    assert!(metrics.len() >= 5, "{metrics:?}");
    for name in metrics.iter().map(|it| it["name"].as_str().unwrap()) {
        let response = read(&setup, &format!("deployments.apps/kuard/{name}"));
        let understood = response.status == 200 || ["no-data", "metric-not-collected"].contains(&response.refusal().1.as_str());
        assert!(understood, "{name}: {}", response.text());
    }
    assert_eq!(read(&setup, "deployments.apps/kuard/http_error_ratio").value(), "250m");
}

#[test]
fn a_bad_file_leaves_the_last_good_one_in_force_and_is_one_line_of_log() {
    let good = |name: &str| file(&json!([{ "name": name, "metric": METRIC }]));
    let setup = start(stage(), &good("load"), &[]);
    setup.adapter.wait_log("metrics.json is in force, hash ");
    assert_eq!(read(&setup, "services/kuard/load").value(), "60");
    let bad = file(&json!([{ "name": "other", "metric": METRIC }, { "name": "wrong", "metric": METRIC, "maxAge": "1s" }]));
    setup.dir.write(FILE, bad);
    let line = "metrics.json is not used: ";
    eventually("the mistake is logged", REREAD, || setup.adapter.log().contains(line));
    let log = setup.adapter.log();
    let found = log.lines().find(|text| text.contains(line)).unwrap();
    assert!(found.contains("\"1s\" must be 10s to 24h at line 1 column "), "{found}");
    assert_eq!(read(&setup, "services/kuard/load").value(), "60", "the last good file is in force");
    assert!(read(&setup, "services/kuard/other").status >= 400, "nothing of a bad one is");
    std::fs::remove_file(setup.dir.path().join(FILE)).unwrap();
    assert_eq!(read(&setup, "services/kuard/load").value(), "60");
    eventually("that it is gone is logged", REREAD, || setup.adapter.log().matches(line).count() == 2);
    setup.dir.write(FILE, good("other"));
    eventually("the new file is in force", REREAD, || read(&setup, "services/kuard/other").status == 200);
    assert!(read(&setup, "services/kuard/load").status >= 400, "what is defined no more is none");
    let log = setup.adapter.log();
    let hashes: Vec<_> = log.lines().filter_map(|text| Some(text.split_once("in force, hash ")?.1)).collect();
    assert_eq!(hashes.len(), 2, "{log}");
    assert!(hashes[0] != hashes[1] && hashes.iter().all(|hash| hash.len() == 16), "{hashes:?}");
    assert_eq!(log.matches(line).count(), 2, "each mistake is one line: {log}");
}

#[test]
fn a_config_map_is_followed_through_the_links_that_kubelet_swaps() {
    let stage = stage();
    let dir = stage.dir.path().to_owned();
    let publish = |version: &str, name: &str| {
        std::fs::create_dir(dir.join(version)).unwrap();
        std::fs::write(dir.join(version).join(FILE), file(&json!([{ "name": name, "metric": METRIC }]))).unwrap();
        symlink(version, dir.join("..data_tmp")).unwrap();
        std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    publish("..first", "load");
    symlink(format!("..data/{FILE}"), dir.join(FILE)).unwrap();
    let setup = stage.start(binary(), &[("CONFIG_FILE", dir.join(FILE).display().to_string())]);
    setup.adapter.wait_ready(&setup.client);
    assert_eq!(read(&setup, "services/kuard/load").value(), "60");
    publish("..second", "other");
    eventually("the new version is in force", REREAD, || read(&setup, "services/kuard/other").status == 200);
    assert!(read(&setup, "services/kuard/load").status >= 400);
}

#[test]
fn a_bad_file_at_the_start_refuses_reads_and_is_mended_without_a_restart() {
    let setup = start(stage(), "{\"metrics\":[{\"name\":\"load\"}]}", &[]);
    for name in ["load", METRIC] {
        let (code, word, message) = read(&setup, &format!("services/kuard/{name}")).refusal();
        assert_eq!((code, word.as_str()), (503, "not-configured"), "{message}");
        assert!(message.contains("CONFIG_FILE is not usable: missing field `metric` at line 1"), "{message}");
    }
    assert_eq!(setup.client.get("/readyz").status, 200);
    assert!(setup.read("/apis/custom.metrics.k8s.io/v1beta2").text().contains(METRIC), "discovery goes on");
    assert!(setup.sysdig.queries().is_empty());
    let (_, word, message) = read(&setup, "queues.rabbitmq.com/orders/load").refusal();
    assert_eq!(word, "not-configured", "it may be defined: {message}");
    setup.dir.write(FILE, file(&json!([{ "name": "load", "metric": METRIC }])));
    eventually("the file is in force", REREAD, || read(&setup, "services/kuard/load").status == 200);
    assert_eq!(read(&setup, &format!("services/kuard/{METRIC}")).value(), "60");
    let list = setup.read("/apis/custom.metrics.k8s.io/v1beta2").text();
    assert!(list.contains("\"services/load\"") && list.contains(METRIC), "listed at once, beside all others: {list}");
}

#[test]
fn a_scope_beyond_the_object_takes_one_object_by_its_name() {
    let setup = start(stage(), &file(&json!([{ "name": "all", "metric": METRIC, "scope": "cluster" }])), &[]);
    for path in [format!("{BASE}/pods/%2A/all"), "/apis/custom.metrics.k8s.io/v1beta2/nodes/worker-1/all".to_owned()] {
        let (code, word, message) = setup.read(&path).refusal();
        assert_eq!((code, word.as_str()), (400, "invalid-request"), "{path}: {message}");
        assert!(message.contains("all measures a Cluster: ask for one object of a namespace by its name"), "{message}");
    }
    assert!(setup.sysdig.queries().is_empty());
}

/// The path of a custom object in Kubernetes.
fn queue(namespace: &str, name: &str) -> String {
    format!("/apis/rabbitmq.com/v1beta1/namespaces/{namespace}/queues/{name}")
}

/// `Queue` with Sysdig's label, and a metric.
fn queues(label: &str, metric: &str) -> String {
    let resource = json!({ "kind": "Queue", "plural": "queues", "apiVersion": "rabbitmq.com/v1beta1", "label": label });
    json!({ "metrics": [{ "name": "waiting", "metric": metric }], "resources": [resource] }).to_string()
}

/// `orders` with 12 messages, `mail` with 5; another `orders` in another namespace and one in another cluster.
fn with_queues() -> Stage {
    let stage = stage();
    for (namespace, name, team) in [("default", "orders", "a"), ("default", "mail", "b"), ("elsewhere", "orders", "a")] {
        stage.kubernetes.object(&queue(namespace, name), json!({ "metadata": { "labels": { "team": team } } }));
    }
    let mut world = stage.sysdig.world();
    for (cluster, namespace, name, depth) in [
        (CLUSTER, "default", "orders", 12.0),
        (CLUSTER, "default", "mail", 5.0),
        (CLUSTER, "elsewhere", "orders", 900.0),
        ("other", "default", "orders", 9000.0),
    ] {
        let [place, label] = ["kubernetes.namespace.name", "kubernetes.pod.label.queue"];
        let labels = [("kubernetes.cluster.name", cluster), (place, namespace), (label, name)];
        world.containers.push(support::sysdig::Container::new(&labels, &[("my.queue.depth", depth)]));
    }
    drop(world);
    stage
}

#[test]
fn objects_of_a_custom_resource_are_looked_up_measured_and_described() {
    let setup = start(with_queues(), &queues("kubernetes.pod.label.queue", "my.queue.depth"), &[]);
    for version in ["v1beta1", "v1beta2"] {
        let base = BASE.replace("v1beta2", version);
        for metric in ["waiting", "my.queue.depth"] {
            let response = setup.read(&format!("{base}/queues.rabbitmq.com/orders/{metric}"));
            assert_eq!(response.value(), "12", "{version} {metric}");
            let expected = json!({
                "kind": "Queue", "namespace": "default", "name": "orders", "apiVersion": "rabbitmq.com/v1beta1",
            });
            assert_eq!(response.json()["items"][0]["describedObject"], expected);
        }
        let all = setup.read(&format!("{base}/queues.rabbitmq.com/%2A/waiting")).values();
        assert_eq!(all, [("mail", "5"), ("orders", "12")].map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        let some = setup.read(&format!("{base}/queues.rabbitmq.com/%2A/waiting?labelSelector=team%3Db"));
        assert_eq!(some.value(), "5");
        let list = setup.read(&format!("/apis/custom.metrics.k8s.io/{version}")).json();
        let resources = list["resources"].as_array().unwrap();
        let listed = resources.iter().find(|it| it["name"] == "queues.rabbitmq.com/waiting").unwrap();
        assert_eq!(listed["namespaced"], true, "{listed}");
    }
    for (rest, expected) in [
        ("queues.rabbitmq.com/nope/waiting", "object-not-found"),
        ("queues.rabbitmq.com/orders/no.such.metric", "backend-rejected"),
        ("queues/orders/waiting", "not-found"),
        ("queues.other.com/orders/waiting", "not-found"),
    ] {
        let (_, word, message) = read(&setup, rest).refusal();
        assert_eq!(word, expected, "{rest}: {message}");
    }
    assert!(setup.kubernetes.requests().iter().any(|it| it.contains("/apis/rabbitmq.com/v1beta1/namespaces/default/queues?")));
    setup.kubernetes.forbid("/apis/rabbitmq.com/");
    let (_, word, message) = read(&setup, "queues.rabbitmq.com/orders/waiting").refusal();
    assert_eq!(word, "kubernetes-forbidden", "{message}");
    assert!(message.contains("docs/definitions.md"), "{message}");
    setup.dir.write(FILE, file(&json!([])));
    eventually("it is defined no more", REREAD, || {
        read(&setup, "queues.rabbitmq.com/orders/my.queue.depth").refusal().1 == "not-found"
    });
}

#[test]
fn in_promql_a_custom_resource_has_its_label_and_hostile_names_are_refused() {
    if let Some(why) = missing() {
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{why}\n"));
        return;
    }
    let series = |cluster: &str, namespace: &str, queue: &str, first: f64| {
        let labels = format!(r#"kube_cluster_name="{cluster}",kube_namespace_name="{namespace}",queue="{queue}""#);
        Samples { series: format!("queue_depth{{{labels}}}"), first, step: 0.0, newest: ONGOING }
    };
    let samples = [
        series("demo", "default", "orders", 12.0),
        series("demo", "default", "mail", 5.0),
        series("demo", "elsewhere", "orders", 900.0),
        series("other", "default", "orders", 9000.0),
    ];
    let prometheus = Prometheus::start(TOKEN, &samples);
    let template = "max by ($by) (max_over_time(queue_depth{$matchers}[$window]))";
    let setup = start(with_queues(), &queues("queue", template), &[("SDC_ENDPOINT", prometheus.url())]);
    for (rest, expected) in [
        ("queues.rabbitmq.com/orders/waiting", "12"),
        ("queues.rabbitmq.com/orders/queue_depth", "12"),
        ("queues.rabbitmq.com/mail/waiting", "5"),
    ] {
        assert_eq!(read(&setup, rest).value(), expected, "{rest}");
    }
    for name in ["orders%22%7D%20or%20up%7Ba%3D%22", "orders%7Cmail", ".%2A", "or'ders"] {
        let (code, _, message) = read(&setup, &format!("queues.rabbitmq.com/{name}/waiting")).refusal();
        assert!((400..500).contains(&code), "{name}: {message}");
    }
}
