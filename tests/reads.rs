//! What autoscalers read, from the real binary over real TLS, with strict stand-ins behind it.

mod support;

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::sysdig::Fault;
use support::{HPA, HPA_GROUPS, Response, Series, Setup, Stage, unix_now};

const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default";

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

fn value(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.text());
    let list = response.json();
    assert_eq!(list["items"].as_array().map(Vec::len), Some(1), "{list}");
    list["items"][0]["value"].as_str().unwrap().to_owned()
}

/// Status code, reason word and message of a refusal.
fn refusal(response: &Response) -> (u16, String, String) {
    let status = response.json();
    assert_eq!((&status["kind"], &status["code"]), (&json!("Status"), &json!(response.status)), "{status}");
    let word = status["details"]["causes"][0]["reason"].as_str().unwrap().to_owned();
    (response.status, word, status["message"].as_str().unwrap().to_owned())
}

#[test]
fn the_metrics_of_the_walk_through_are_read_as_quantities() {
    let setup = Setup::start(binary);
    let table = [
        ("net.http.request.count", 6.75, "6750m"),
        ("net.http.request.time", 93_725_000.0, "93725k"),
        ("net.http.request.count", 93.725, "93725m"),
        ("file.iops.total", 0.0004, "400u"),
        ("memory.used.percent", 42.5, "42500m"),
        ("memory.used.percent", 0.0, "0"),
        ("jvm.heap.used", 1_503_006_750.0, "1503006750"),
        ("jvm.heap.used", -2.5, "-2500m"),
        ("jvm.heap.used", 1e-12, "1n"),
    ];
    for (metric, number, quantity) in table {
        setup.sysdig.world().set("default", "kuard", metric, number);
        assert_eq!(value(&setup.read(&format!("{BASE}/services/kuard/{metric}"))), quantity, "{metric} {number}");
    }
}

#[test]
fn every_kind_of_object_is_read_by_name_in_both_versions() {
    let stage = Stage::new();
    {
        let mut world = stage.sysdig.world();
        for (kind, name) in [("statefulset", "db"), ("daemonset", "logs"), ("job", "backup")] {
            world.workload(kind, "demo", "default", name, None, 2, &[("net.http.request.count", 7.0)]);
        }
    }
    let object = |path: &str, ready: Value| stage.kubernetes.object(path, json!({ "status": ready }));
    object("/apis/apps/v1/namespaces/default/statefulsets/db", json!({ "readyReplicas": 2 }));
    object("/apis/apps/v1/namespaces/default/daemonsets/logs", json!({ "numberReady": 2 }));
    object("/apis/batch/v1/namespaces/default/jobs/backup", json!({ "ready": 2 }));
    object("/apis/apps/v1/namespaces/default/replicasets/kuard-5d9c", json!({ "readyReplicas": 3 }));
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    let table = [
        ("pods/kuard-0", "Pod", "v1", "kuard-0", "50"),
        ("services/kuard", "Service", "v1", "kuard", "50"),
        ("deployments.apps/kuard", "Deployment", "apps/v1", "kuard", "50"),
        ("deployments.extensions/kuard", "Deployment", "extensions/v1beta1", "kuard", "50"),
        ("deployments/kuard", "Deployment", "apps/v1", "kuard", "50"),
        ("replicasets.apps/kuard-5d9c", "ReplicaSet", "apps/v1", "kuard-5d9c", "50"),
        ("statefulsets.apps/db", "StatefulSet", "apps/v1", "db", "7"),
        ("daemonsets/logs", "DaemonSet", "apps/v1", "logs", "7"),
        ("jobs.batch/backup", "Job", "batch/v1", "backup", "7"),
        ("services/deployment;kuard", "Service", "v1", "deployment;kuard", "50"),
        ("services/statefulset%3Bdb", "Service", "v1", "statefulset;db", "7"),
    ];
    for version in ["v1beta1", "v1beta2"] {
        for (object, kind, api_version, name, expected) in table {
            let path = format!("/apis/custom.metrics.k8s.io/{version}/namespaces/default/{object}/net.http.request.count");
            let response = setup.read(&path);
            assert_eq!(value(&response), expected, "{path}");
            let list = response.json();
            assert_eq!(list["metadata"]["selfLink"], path);
            let described = json!({ "kind": kind, "namespace": "default", "name": name, "apiVersion": api_version });
            assert_eq!(list["items"][0]["describedObject"], described);
        }
        let path = format!("/apis/custom.metrics.k8s.io/{version}/namespaces/default/metrics/container.count");
        assert_eq!(value(&setup.read(&path)), "1", "the average over the namespace's containers");
    }
}

#[test]
fn a_question_names_cluster_namespace_and_object_and_a_finished_window() {
    let setup = Setup::start(binary);
    setup.read(&format!("{BASE}/services/kuard/net.http.request.count"));
    let queries = setup.sysdig.queries();
    let [query] = queries.as_slice() else { panic!("{queries:#?}") };
    assert_eq!(
        query["filter"],
        "kubernetes.cluster.name = 'demo' and kubernetes.namespace.name = 'default' and kubernetes.service.name = 'kuard'"
    );
    assert_eq!(query["dataSourceType"], "container");
    assert!(query["paging"].is_object());
    let (start, end) = (query["start"].as_i64().unwrap(), query["end"].as_i64().unwrap());
    assert_eq!((end - start, end % 10), (60, 0));
    assert!((10..=30).contains(&(unix_now() - end)), "one finished step is left out");
    let average = json!({ "time": "avg", "group": "avg" });
    assert!(query["metrics"].as_array().unwrap().contains(&json!({ "id": "net.http.request.count", "aggregations": average })));
}

#[test]
fn a_sum_over_the_pods_is_what_an_average_value_divides() {
    let setup = Setup::start(binary);
    for (version, selector, expected) in [
        ("v1beta1", "", "50"),
        ("v1beta1", "?metricLabelSelector=sysdig%2Fgroup-aggregation%3Dsum", "150"),
        ("v1beta2", "?metricLabelSelector=sysdig%2Fgroup-aggregation%3Dsum", "150"),
        ("v1beta2", "?metricLabelSelector=sysdig%2Fgroup-aggregation%3Davg", "50"),
    ] {
        let base = BASE.replace("v1beta1", version);
        for object in ["services/kuard", "deployments.apps/kuard", "services/deployment;kuard"] {
            let response = setup.read(&format!("{base}/{object}/net.http.request.count{selector}"));
            assert_eq!(value(&response), expected, "{version} {object} {selector}");
        }
    }
    let sum = format!("{BASE}/services/kuard/net.http.request.count?metricLabelSelector=sysdig/group-aggregation=sum");
    setup.sysdig.world().containers_of("default", "kuard").next().unwrap().labels.clear();
    let (code, word, message) = refusal(&setup.read(&sum));
    assert_eq!((code, word.as_str()), (404, "partly-seen"), "{message}");
    assert!(message.contains("2 of its 3 ready pods"), "a sum over a part would scale down: {message}");
    assert_eq!(value(&setup.read(&format!("{BASE}/services/kuard/net.http.request.count"))), "50");

    setup.deployment("default", "kuard", 3, &[]);
    setup.deployment("default", "other", 1, &[("net.http.request.count", 1.0)]);
    assert_eq!(value(&setup.read(&sum)), "0");
}

#[test]
fn an_idle_service_is_zero_only_with_proof() {
    let setup = Setup::start(binary);
    let path = format!("{BASE}/services/kuard/net.http.request.count");
    setup.sysdig.world().unset("default", "kuard", "net.http.request.count");

    let (code, word, message) = refusal(&setup.read(&path));
    assert_eq!((code, word.as_str()), (404, "metric-not-collected"), "{message}");
    assert!(message.contains("essentials"), "{message}");
    setup.adapter.signal("KILL");

    let setup = Setup::start(binary);
    setup.sysdig.world().unset("default", "kuard", "net.http.request.count");
    setup.deployment("default", "other", 1, &[("net.http.request.count", 1.0)]);
    assert_eq!(value(&setup.read(&path)), "0", "collected in the cluster, and every ready pod is seen");

    setup.sysdig.world().containers_of("default", "kuard").next().unwrap().labels.clear();
    let (code, word, message) = refusal(&setup.read(&path));
    assert_eq!((code, word.as_str()), (404, "partly-seen"), "{message}");
    assert!(message.contains("2 of its 3 ready pods"), "{message}");

    setup.sysdig.world().remove_workload("default", "kuard");
    let (code, word, message) = refusal(&setup.read(&path));
    assert_eq!((code, word.as_str()), (404, "no-data"), "{message}");
    assert!(message.contains("CLUSTER_NAME"), "{message}");
}

#[test]
fn a_metric_that_went_silent_is_zero_by_proof_and_not_a_stale_number() {
    let setup = Setup::start(binary);
    let silent = Series::Since { value: 50.0, from_unix: 0, until_unix: unix_now() - 300 };
    setup.sysdig.world().set("default", "kuard", "net.http.request.count", silent);
    assert_eq!(value(&setup.read(&format!("{BASE}/services/kuard/net.http.request.count"))), "0");
}

#[test]
fn where_no_pods_are_counted_only_what_the_agent_counts_is_zero_in_silence() {
    let setup = Setup::start(binary);
    let silent = Series::Since { value: 50.0, from_unix: 0, until_unix: unix_now() - 300 };
    for metric in ["net.http.request.count", "my.queue.length"] {
        setup.sysdig.world().set("default", "kuard", metric, silent);
    }
    let read = |rest: &str| setup.read(&format!("{BASE}/{rest}"));
    assert_eq!(value(&read("metrics/net.http.request.count")), "0");
    let (code, word, message) = refusal(&read("metrics/my.queue.length"));
    assert_eq!((code, word.as_str()), (404, "no-data"), "its exporter may have died: {message}");
    assert_eq!(value(&read("services/kuard/my.queue.length")), "0", "Sysdig sees each of its pods");
}

#[test]
fn every_value_has_its_age_and_none_is_older_than_its_bound() {
    let setup = Setup::start(binary);
    let path = format!("{BASE}/services/kuard/net.http.request.count");
    let list = setup.read(&path).json();
    assert_eq!(list["items"][0]["window"], 60);
    setup.sysdig.fail(Fault::Stale(90));
    assert_eq!(setup.read(&path).status, 200);
    setup.sysdig.fail(Fault::Stale(150));
    let (code, word, message) = refusal(&setup.read(&path));
    assert_eq!((code, word.as_str()), (503, "too-old"));
    assert!(message.contains("MAX_AGE (120 s)"), "{message}");
    setup.sysdig.fail(Fault::Future(600));
    let (_, word, message) = refusal(&setup.read(&path));
    assert_eq!(word, "backend-invalid-answer");
    assert!(message.contains("clock"), "{message}");
}

#[test]
fn what_does_not_exist_or_may_not_be_read_is_said_so() {
    let setup = Setup::start(binary);
    let (code, word, message) = refusal(&setup.read(&format!("{BASE}/services/nope/net.http.request.count")));
    assert_eq!((code, word.as_str()), (404, "object-not-found"));
    assert_eq!(message, "Service nope in namespace default does not exist");
    let (_, word, message) = refusal(&setup.read(&format!("{BASE}/services/kuard/no.such.metric")));
    assert_eq!(word, "backend-rejected");
    assert!(message.contains("no.such.metric"), "Sysdig's own words: {message}");
    setup.kubernetes.forbid("/api/v1/namespaces/default/services");
    let (code, word, message) = refusal(&setup.read(&format!("{BASE}/services/kuard/net.http.request.count")));
    assert_eq!((code, word.as_str()), (503, "kubernetes-forbidden"));
    assert!(message.contains("cannot list resource \\\"services\\\""), "the missing rule: {message}");
}

#[test]
fn two_clusters_in_one_account_are_kept_apart() {
    let setup = Setup::start(binary);
    setup.sysdig.world().deployment("other", "default", "kuard", Some("kuard"), 3, &[("net.http.request.count", 900.0)]);
    assert_eq!(value(&setup.read(&format!("{BASE}/services/kuard/net.http.request.count"))), "50");
}

#[test]
fn what_is_not_configured_yet_is_said_with_the_command_that_mends_it() {
    let path = format!("{BASE}/services/kuard/net.http.request.count");
    let table = [
        ("SDC_TOKEN", "", "kubectl create secret generic"),
        ("SDC_TOKEN_FILE", "/nonexistent/access-key", "/nonexistent/access-key"),
        ("CLUSTER_NAME", "YourClusterName", "kubectl set env deployment/custom-metrics-apiserver"),
    ];
    for (name, setting, mend) in table {
        let setup = Setup::start_with(binary, &[(name, setting.to_owned())]);
        let (code, word, message) = refusal(&setup.read(&path));
        assert_eq!((code, word.as_str()), (503, "not-configured"), "{name}");
        assert!(message.contains(mend), "{message}");
        assert_eq!(setup.client.get_as(HPA, &HPA_GROUPS, "/apis").status, 200, "discovery works all the same");
    }
}

#[test]
fn a_token_file_wins_and_is_read_again_when_it_changes() {
    let stage = Stage::new();
    let file = stage.dir.write("access-key", "old-token\n");
    let overrides = [("SDC_TOKEN", "a-token-that-does-not-count".to_owned()), ("SDC_TOKEN_FILE", file.display().to_string())];
    stage.sysdig.set_token("new-token");
    let setup = stage.start(binary(), &overrides);
    setup.adapter.wait_ready(&setup.client);
    let path = format!("{BASE}/services/kuard/net.http.request.count");
    let (_, word, message) = refusal(&setup.read(&path));
    assert_eq!(word, "backend-unauthorized");
    assert!(!message.contains("old-token") && !setup.adapter.log().contains("old-token"), "{message}");
    setup.dir.write("access-key", "new-token\n");
    assert_eq!(value(&setup.read(&path)), "50");
}

#[test]
fn discovery_lists_sysdigs_metrics_and_does_without_sysdig() {
    let stage = Stage::new();
    stage.sysdig.world().describe("my.own.metric", "gauge");
    stage.sysdig.world().describe("a.label", "none");
    stage.sysdig.fail(Fault::Status(500));
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    let names = || -> Vec<String> {
        let list = setup.read("/apis/custom.metrics.k8s.io/v1beta1").json();
        list["resources"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap().to_owned()).collect()
    };
    assert!(names().contains(&"services/net.http.request.count".to_owned()), "well-known ids stand in");
    drop(setup);

    let stage = Stage::new();
    for n in 0..2500 {
        stage.sysdig.world().describe(&format!("my.own.metric.{n}"), "gauge");
    }
    stage.sysdig.world().describe("a.label", "none");
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    let listed = || {
        let list = setup.read("/apis/custom.metrics.k8s.io/v1beta2");
        assert!(list.body.len() <= 256 * 1024);
        list.text()
    };
    support::eventually("the catalogue's pages are listed", Duration::from_secs(10), || {
        listed().contains("services/my.own.metric.2")
    });
    assert!(!listed().contains("a.label"));
    let apis = "/apis/custom.metrics.k8s.io";
    let paths = ["/", "/apis", apis, &format!("{apis}/v1beta1"), &format!("{apis}/v1beta2"), "/openapi/v2", "/openapi/v3"];
    let all = || paths.map(|path| setup.client.get_as("root", &["system:masters"], path)).map(|it| (it.status, it.text()));
    let before = all();
    assert!(before.iter().all(|(status, _)| *status == 200), "{before:?}");
    setup.sysdig.fail(Fault::Hang);
    assert!(setup.read(&format!("{BASE}/services/kuard/net.http.request.count")).status >= 500);
    assert_eq!(all(), before, "all of it is the same while Sysdig hangs");
}

#[test]
fn one_outage_is_two_lines_of_log() {
    let setup = Setup::start(binary);
    let path = format!("{BASE}/services/kuard/net.http.request.count");
    setup.sysdig.fail(Fault::Status(500));
    for _ in 0..5 {
        assert_eq!(setup.read(&path).status, 503);
    }
    setup.sysdig.heal();
    assert_eq!(setup.read(&path).status, 200);
    setup.adapter.wait_log("Sysdig: works again (failures: 5)");
    let log = setup.adapter.log();
    assert_eq!(log.lines().filter(|line| line.contains("Sysdig: backend-error")).count(), 1, "{log}");
}

#[test]
fn wrong_settings_are_all_reported_at_once_and_end_the_start() {
    let stage = Stage::new();
    let empty = stage.dir.write("empty.pem", "").display().to_string();
    let table = [
        (
            vec![("SDC_ENDPOINT", "ftp://x"), ("MAX_AGE", "1s"), ("LISTEN_ADDR", "nowhere")],
            vec!["SDC_ENDPOINT", "MAX_AGE", "LISTEN_ADDR"],
        ),
        (vec![("SDC_CA_FILE", empty.as_str())], vec!["SDC_CA_FILE"]),
    ];
    for (settings, named) in table {
        let mut env = stage.env();
        env.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let adapter = support::Adapter::spawn(binary(), &env);
        let status = adapter.wait_exit(Duration::from_secs(10)).unwrap();
        assert_eq!(status.code(), Some(2), "{}", adapter.log());
        for name in named {
            assert!(adapter.log().contains(name), "{name}: {}", adapter.log());
        }
        assert!(!adapter.log().contains("test-token"));
    }
}

#[test]
fn arguments_are_no_settings_and_an_unknown_one_ends_the_start() {
    for argument in ["serve", "--listen=0.0.0.0:1", "-v"] {
        let mut command = binary();
        command.arg(argument);
        let adapter = support::Adapter::spawn(command, &Stage::new().env());
        let status = adapter.wait_exit(Duration::from_secs(10)).unwrap();
        assert_eq!(status.code(), Some(2), "{argument}: {}", adapter.log());
        assert!(adapter.log().contains("is no command: see sysdig-metrics-adapter --help"), "{}", adapter.log());
    }
}
