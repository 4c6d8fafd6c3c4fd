//! The commands, with the real binary between the stand-ins: what they print, and how they end.

#![allow(clippy::needless_pass_by_value, reason = "metrics are written as nested calls")]

#[path = "support/prometheus.rs"]
mod prometheus;
mod support;

use std::io::Write;
use std::process::{Command, Stdio};

use prometheus::{Prometheus, Samples, missing};
use serde_json::{Value, json};
use support::dir::TempDir;
use support::{CLUSTER, METRIC, Setup, Stage, TOKEN, api_service, slot};

type Env = Vec<(&'static str, String)>;

/// Exit code, stdout and stderr.
#[track_caller]
fn run(env: &Env, arguments: &[&str], stdin: &[u8]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"));
    command.env_clear().envs(env.iter().map(|(name, value)| (*name, value))).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut input, bytes) = (child.stdin.take().unwrap(), stdin.to_vec());
    // It may end before it has read all of it.
    let writer = std::thread::spawn(move || drop(input.write_all(&bytes)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (output.status.code().unwrap(), stdout, stderr)
}

fn object(kind: &str, api: &str, name: &str, metric: &str, target: Value) -> Value {
    let described = json!({ "kind": kind, "apiVersion": api, "name": name });
    json!({ "type": "Object", "object": { "describedObject": described, "metric": { "name": metric }, "target": target } })
}

fn value(quantity: &str) -> Value {
    json!({ "type": "Value", "value": quantity })
}

fn average(quantity: &str) -> Value {
    json!({ "type": "AverageValue", "averageValue": quantity })
}

/// An HPA of Deployment `kuard`, 3 to 10 replicas, 3 now.
fn hpa(metrics: Vec<Value>) -> Value {
    json!({
        "kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v2",
        "metadata": { "name": "kuard", "namespace": "default" },
        "spec": {
            "scaleTargetRef": { "kind": "Deployment", "apiVersion": "apps/v1", "name": "kuard" },
            "minReplicas": 3, "maxReplicas": 10, "metrics": metrics,
        },
        "status": { "currentReplicas": 3 },
    })
}

fn pods(metric: &str, target: Value) -> Value {
    json!({ "type": "Pods", "pods": { "metric": { "name": metric }, "target": target } })
}

fn external(metric: &str, target: Value) -> Value {
    json!({ "type": "External", "external": { "metric": { "name": metric }, "target": target } })
}

/// The metric with a selector of it.
fn selected(mut metric: Value, labels: Value) -> Value {
    let kind = metric["type"].as_str().unwrap().to_ascii_lowercase();
    metric[kind]["metric"]["selector"] = labels;
    metric
}

fn sum(metric: Value) -> Value {
    selected(metric, json!({ "matchLabels": { "sysdig/group-aggregation": "sum" } }))
}

/// The text without what differs from run to run: times in seconds, as dates, and ages.
fn steady(text: &str) -> String {
    let word = |word: &str| {
        let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        let is_date = bare.len() == 20 && bare.ends_with('Z') && bare.as_bytes()[10] == b'T';
        if is_date { word.replace(bare, "DATE") } else { word.to_owned() }
    };
    let mut out = String::new();
    for line in text.lines() {
        let line: Vec<String> = line.split(' ').map(word).collect();
        let mut line = line.join(" ");
        if let Some((head, age)) = line.split_once(" s to DATE, ") {
            let seconds: u64 = age.split(' ').next().unwrap().parse().unwrap();
            assert!((10..40).contains(&seconds), "{age}");
            line = format!("{head} s to DATE, AGE{}", &age[seconds.to_string().len()..]);
        }
        out.push_str(&line);
        out.push('\n');
    }
    // Unix seconds have ten digits, and milliseconds are nowhere.
    let mut rest = out.as_str();
    let mut done = String::new();
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let digits = rest[at..].bytes().take_while(u8::is_ascii_digit).count();
        done.push_str(&rest[..at]);
        done.push_str(if digits == 10 { "TIME" } else { &rest[at..at + digits] });
        rest = &rest[at + digits..];
    }
    done + rest
}

fn with(mut env: Env, more: &[(&'static str, &str)]) -> Env {
    for (name, value) in more {
        env.retain(|(known, _)| known != name);
        env.push((name, (*value).to_owned()));
    }
    env
}

/// Explains the metrics of an HPA of `kuard`: the exit code, and the lines without times.
#[track_caller]
fn explain(env: &Env, metrics: Vec<Value>) -> (i32, String) {
    let (code, out, err) = run(env, &["explain", "-"], hpa(metrics).to_string().as_bytes());
    assert_eq!(err, "");
    (code, steady(&out))
}

/// The lines that begin so, without what they begin with.
fn rows<'a>(out: &'a str, what: &str) -> Vec<&'a str> {
    out.lines().filter_map(|line| line.trim_start().strip_prefix(what)?.strip_prefix(": ")).collect()
}

/// Compares with the section of the file that stands under `== NAME`.
#[track_caller]
fn assert_golden(name: &str, found: &str) {
    let all = include_str!("commands/explain.txt");
    let section = all.split("== ").find_map(|part| part.strip_prefix(name)?.strip_prefix('\n'));
    assert_eq!(Some(found.trim_end()), section.map(str::trim_end), "{name}:\n{found}");
}

#[test]
fn explain_shows_the_whole_way_of_a_metric_over_the_data_api() {
    let stage = Stage::new();
    let table = [
        ("Object, Value", object("Service", "v1", "kuard", METRIC, value("30"))),
        ("Object, AverageValue", sum(object("Deployment", "apps/v1", "kuard", METRIC, average("30")))),
        ("Pods", pods(METRIC, average("20"))),
        ("External", external(METRIC, average("10"))),
    ];
    let env = with(stage.env(), &[("EXTERNAL_METRICS", "true")]);
    for (case, metric) in table {
        let (code, out) = explain(&env, vec![metric]);
        assert_eq!(code, 0, "{out}");
        assert_golden(case, &out);
    }
}

/// Three pods with 100, 200 and 300 requests in each 10 s, behind a real Prometheus that plays Sysdig.
fn promql(stage: &Stage) -> Option<(Prometheus, Env)> {
    if missing().is_some_and(|why| writeln!(std::io::stderr(), "{why}").is_ok()) {
        return None;
    }
    let mut samples = Vec::new();
    for index in 0..3 {
        let labels = format!(
            r#"kube_cluster_name="{CLUSTER}",kube_namespace_name="default",kube_deployment_name="kuard",kube_pod_name="kuard-{index}""#
        );
        let numbers = [("sysdig_container_up", 1.0), ("sysdig_container_net_http_request_count", f64::from(100 * (index + 1)))];
        for (name, first) in numbers {
            samples.push(Samples { series: format!("{name}{{{labels}}}"), first, step: 0.0, newest: -1200 });
        }
    }
    let prometheus = Prometheus::start(TOKEN, &samples);
    let env = with(stage.env(), &[("SDC_ENDPOINT", &prometheus.url()), ("SDC_BACKEND", "promql"), ("EXTERNAL_METRICS", "true")]);
    Some((prometheus, env))
}

#[test]
fn explain_shows_the_whole_way_of_a_metric_over_promql() {
    let stage = Stage::new();
    let Some((_prometheus, env)) = promql(&stage) else { return };
    let table = [
        ("PromQL, Object, Value", object("Service", "v1", "kuard", METRIC, value("10"))),
        ("PromQL, Object, AverageValue", sum(object("Deployment", "apps/v1", "kuard", METRIC, average("10")))),
        ("PromQL, Pods", pods(METRIC, average("15"))),
        ("PromQL, External", sum(external(METRIC, average("30")))),
    ];
    for (case, metric) in table {
        let (code, out) = explain(&env, vec![metric]);
        assert_eq!(code, 0, "{out}");
        // Prometheus orders its series as it likes.
        let (answers, rest): (Vec<&str>, Vec<&str>) = out.lines().partition(|line| line.contains("Sysdig answers"));
        assert!(answers.iter().all(|line| line.contains(r#"{"status":"success","data":{"#)), "{answers:?}");
        assert_golden(case, &rest.join("\n"));
    }
}

#[test]
fn explain_computes_as_the_hpa_controller_does() {
    let stage = Stage::new();
    let by_service = |target| object("Service", "v1", "kuard", METRIC, target);
    let by_sum = |target| sum(by_service(target));
    // Each pod has 50.
    let table = [
        (by_service(value("25")), "6: 3 pods × 50 ÷ 25 = 6 (rounded up)"),
        (by_service(value("26")), "6: 3 pods × 50 ÷ 26 = 6 (rounded up)"),
        (by_service(value("46")), "3: 3 pods × 50 ÷ 46 = 3 (as now: within the tolerance of 0.1)"),
        (by_service(value("55")), "3: 3 pods × 50 ÷ 55 = 3 (as now: within the tolerance of 0.1)"),
        (by_service(value("1k")), "3: 3 pods × 50 ÷ 1000 = 1 (rounded up)"),
        (by_service(value("500m")), "10: 3 pods × 50 ÷ 0.5 = 300 (rounded up)"),
        (by_service(value("2e1")), "8: 3 pods × 50 ÷ 20 = 8 (rounded up)"),
        (by_service(value("1Ki")), "3: 3 pods × 50 ÷ 1024 = 1 (rounded up)"),
        (by_sum(average("50")), "3: 150 ÷ 50 = 3 (as now: within the tolerance of 0.1)"),
        (by_sum(average("46")), "3: 150 ÷ 46 = 3 (as now: within the tolerance of 0.1)"),
        (by_sum(average("37500m")), "4: 150 ÷ 37.5 = 4 (rounded up)"),
        (pods(METRIC, average("30")), "5: 150 ÷ 30 = 5 (rounded up)"),
    ];
    for (metric, expected) in table {
        let (code, out) = explain(&stage.env(), vec![metric]);
        let found = rows(&out, "replicas");
        assert!(code == 0 && found.len() == 1 && found[0].starts_with(expected), "{expected}: {out}");
    }
    let with_replicas = |metric: Value, now: u64| {
        let mut hpa = hpa(vec![metric]);
        hpa["status"] = json!({ "currentReplicas": now });
        let (_, out, _) = run(&stage.env(), &["explain", "-"], hpa.to_string().as_bytes());
        rows(&out, "replicas")[0].to_owned()
    };
    let stopped = with_replicas(by_service(value("25")), 0);
    assert!(stopped.starts_with("none: its target is scaled to 0 by hand"), "the HPA leaves it alone: {stopped}");
    let from_zero = |target: &str| {
        let mut hpa = hpa(vec![by_service(value(target))]);
        // Kubernetes leaves out currentReplicas where it is 0.
        (hpa["spec"]["minReplicas"], hpa["status"]) = (json!(0), json!({ "desiredReplicas": 0 }));
        let (_, out, _) = run(&stage.env(), &["explain", "-"], hpa.to_string().as_bytes());
        rows(&out, "replicas")[0].to_owned()
    };
    let (idle, near) = (from_zero("25"), from_zero("48"));
    assert!(idle.starts_with("2: 1 pods × 50 ÷ 25 = 2 (rounded up)"), "{idle}");
    assert!(near.starts_with("2: 1 pods × 50 ÷ 48 = 2 (rounded up)"), "without pods there is no tolerance: {near}");
    let partly = with_replicas(pods(METRIC, average("30")), 4);
    assert!(partly.starts_with("not known here: 3 of 4 pods have a value"), "{partly}");
}

#[test]
fn explain_reads_the_hpa_from_the_cluster_if_rbac_lets_it() {
    let stage = Stage::new();
    let path = "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers/kuard";
    let metrics = vec![object("Service", "v1", "kuard", METRIC, value("30")), pods(METRIC, average("20"))];
    stage.kubernetes.object(path, hpa(metrics.clone()));
    let (code, out, err) = run(&stage.env(), &["explain", "default/kuard"], b"");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(steady(&out), explain(&stage.env(), metrics).1);

    stage.kubernetes.forbid("/apis/autoscaling");
    let (code, out, err) = run(&stage.env(), &["explain", "default/kuard"], b"");
    assert!(code == 2 && out.is_empty() && err.starts_with("kubernetes-forbidden: "), "{out}{err}");
    assert!(err.contains("HPA default/kuard") && err.contains("manifests/components/doctor-rbac"), "{err}");
    stage.kubernetes.allow();
    stage.kubernetes.forbid("/apis/apps/v1/namespaces/default/deployments");
    let (code, out, _) = run(&stage.env(), &["explain", "default/kuard"], b"");
    assert_eq!((code, rows(&out, "replicas").len()), (1, 1), "{out}");
    assert!(rows(&out, "finding")[0].starts_with("kubernetes-forbidden: "), "{out}");
    stage.kubernetes.allow();
    let (code, out, err) = run(&stage.env(), &["explain", "default/other"], b"");
    assert_eq!((code, out.as_str()), (2, ""));
    assert_eq!(err, "object-not-found: HPA default/other does not exist\n");
    let (code, _, err) = run(&with(stage.env(), &[("KUBERNETES_SERVICE_PORT", "1")]), &["explain", "a/b"], b"");
    assert!(code == 2 && err.starts_with("kubernetes-unavailable: "), "{err}");
}

/// The closed list of reasons.
fn is_word(word: &str) -> bool {
    include_str!("../docs/reasons.md").lines().any(|line| line.starts_with(&format!("| `{word}` |")))
}

#[test]
fn explain_tells_refusals_with_their_words() {
    let stage = Stage::new();
    let of = |name: &str, metric: &str| object("Deployment", "apps/v1", name, metric, value("30"));
    let good = || of("kuard", METRIC);
    stage.deployment("default", "silent", 1, &[]);
    stage.deployment("default", "huge", 1, &[(METRIC, 1e300)]);
    stage.deployment("default", "unseen", 2, &[(METRIC, 1.0)]);
    stage.deployment("default", "gone", 1, &[(METRIC, 1.0)]);
    stage.sysdig.world().remove_workload("default", "gone");
    stage.sysdig.world().containers.retain(|it| it.label("kubernetes.pod.name") != Some("unseen-1"));
    let table = [
        (of("nobody", METRIC), "object-not-found: Deployment nobody in namespace default does not exist"),
        (of("silent", "jvm.heap.used"), "metric-not-collected: "),
        (of("gone", METRIC), "no-data: "),
        (of("huge", METRIC), "out-of-range: "),
        (sum(object("Deployment", "apps/v1", "unseen", METRIC, average("30"))), "partly-seen: "),
        (of("kuard", "a b"), "invalid-request: "),
        (object("Ingress", "networking.k8s.io/v1", "x", METRIC, value("1")), "not-found: \"Ingress\" of apiVersion"),
        (object("Deployment", "", "kuard", METRIC, value("1")), "not-found: \"Deployment\" of apiVersion \"\""),
        (object("Service", "v1", "kuard", METRIC, value("0")), "invalid-request: the target of type \"Value\" is \"0\""),
        (json!({ "type": "Nonsense" }), "invalid-request: "),
    ];
    for (metric, expected) in table {
        let (code, out) = explain(&stage.env(), vec![good(), metric, good()]);
        let refused = rows(&out, "finding");
        assert!(code == 1 && refused.len() == 1 && refused[0].starts_with(expected), "{expected}: {out}");
        assert!(refused[0].split_once(": ").is_some_and(|(word, _)| is_word(word)), "{out}");
        assert_eq!(rows(&out, "replicas").len(), 2, "the others are explained all the same: {out}");
    }
    let resource = json!({ "type": "Resource", "resource": { "name": "cpu" } });
    let (code, out) = explain(&stage.env(), vec![resource, external(METRIC, average("1"))]);
    assert_eq!(
        (code, rows(&out, "not ours")),
        (0, vec!["it is metrics-server's, or of type External with EXTERNAL_METRICS off"; 2])
    );
    let faults = [
        (support::sysdig::Fault::Stale(150), "too-old: "),
        (support::sysdig::Fault::Status(401), "backend-unauthorized: "),
        (support::sysdig::Fault::Status(403), "backend-forbidden: "),
        (support::sysdig::Fault::Status(429), "backend-rate-limited: "),
        (support::sysdig::Fault::Status(500), "backend-error: "),
        (support::sysdig::Fault::Garbage, "backend-invalid-answer: "),
        (support::sysdig::Fault::Empty, "no-data: "),
    ];
    for (fault, expected) in faults {
        stage.sysdig.fail(fault);
        let (code, out) = explain(&stage.env(), vec![good()]);
        assert!(code == 1 && rows(&out, "finding")[0].starts_with(expected), "{expected}: {out}");
        assert!(!out.contains(TOKEN) && out.lines().count() >= 4, "{out}");
    }
    stage.sysdig.heal();
    for (name, value) in [("CLUSTER_NAME", ""), ("SDC_TOKEN", "")] {
        let (code, out) = explain(&with(stage.env(), &[(name, value)]), vec![good()]);
        assert!(code == 1 && rows(&out, "finding")[0].starts_with("not-configured: "), "{out}");
        assert_eq!(rows(&out, "Sysdig is asked"), Vec::<&str>::new());
    }
}

/// What docs/commands.md shows of a command.
fn documented(command: &str) -> &'static str {
    let all = include_str!("../docs/commands.md");
    let section = all.split("\n## ").find_map(|part| part.strip_prefix(command)).expect("its section");
    section.split("```").nth(1).expect("an example")
}

#[test]
fn the_documents_show_what_explain_prints() {
    let example = documented("explain").split_once("default/kuard\n").expect("the command").1;
    assert_golden("Object, Value", &steady(example));
}

const KEDA: &str = "/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.external.metrics.k8s.io";

/// A cluster where all is well: the adapter has published its certificate, and the API server reaches it.
fn healthy() -> Setup {
    let setup = Setup::start(|| Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter")));
    for version in ["v1beta1", "v1beta2"] {
        available(&setup, version, "True", "all checks passed");
    }
    // It would mend what the tests break.
    setup.adapter.signal("KILL");
    setup
}

fn available(stage: &Stage, version: &str, status: &str, message: &str) {
    let path = api_service(version);
    let mut api = stage.kubernetes.objects()[&path].clone();
    api["status"]["conditions"] = json!([{ "type": "Available", "status": status, "message": message }]);
    stage.kubernetes.object(&path, api);
}

/// What doctor says: its exit code, its lines, and those that are not ok. Checks that `--json` says the same.
#[track_caller]
fn doctor(env: &Env) -> (i32, String, Vec<String>) {
    let (code, out, err) = run(env, &["doctor"], b"");
    assert_eq!(err, "");
    let (json_code, json, _) = run(env, &["doctor", "--json"], b"");
    let rows: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!((code, out.lines().count()), (json_code, rows.len()));
    for (row, line) in rows.iter().zip(out.lines()) {
        let text = |key: &str| row[key].as_str().unwrap().to_owned();
        assert!(line.starts_with(&format!("{:<4}  {}", text("status"), text("check"))), "{line}\n{row}");
        assert!(
            (text("word") == "ok" || line.contains(&text("word"))) && ["ok", "warn", "fail"].contains(&text("status").as_str()),
            "{row}"
        );
        assert!(if text("status") == "ok" { text("word") == "ok" } else { is_word(&text("word")) }, "{row}");
    }
    let bad = out.lines().filter(|line| !line.starts_with("ok ")).map(str::to_owned).collect();
    (code, out, bad)
}

#[test]
fn doctor_finds_nothing_where_all_is_well() {
    let setup = healthy();
    let (code, out, bad) = doctor(&setup.env());
    assert_eq!((code, bad), (0, Vec::new()));
    assert!(documented("doctor").contains(&out), "docs/commands.md shows something else:\n{out}");
    // Whose it is may not be seen without the component doctor-rbac, and is none of this adapter's business.
    setup.kubernetes.forbid(KEDA);
    let (code, out, bad) = doctor(&setup.env());
    assert!(code == 0 && bad.is_empty() && out.contains("manifests/components/doctor-rbac"), "{out}");
    // Whose it is, is told where it may be seen.
    setup.kubernetes.allow();
    setup.kubernetes.object(KEDA, slot("v1beta1", "keda-metrics-apiserver"));
    let (code, out, bad) = doctor(&setup.env());
    assert!(code == 0 && bad.is_empty() && out.contains("belongs to Service custom-metrics/keda-metrics-apiserver"), "{out}");
}

#[test]
fn doctor_names_what_is_broken_and_its_mend() {
    type Break = fn(&Stage, &mut Env);
    let table: Vec<(Break, &str, &[&str], i32)> = vec![
        (
            |_, env| *env = with(env.clone(), &[("CLUSTER_NAME", "YourClusterName")]),
            "fail  cluster name",
            &["not-configured: ", "CLUSTER_NAME=NAME"],
            1,
        ),
        (|_, env| env.retain(|it| it.0 != "SDC_TOKEN"), "fail  Sysdig token", &["not-configured: ", "kubectl create secret"], 1),
        (
            |stage, _| {
                let mut foreign = slot("v1beta2", "prometheus-adapter");
                foreign["spec"]["service"]["namespace"] = json!("monitoring");
                stage.kubernetes.object(&api_service("v1beta2"), foreign);
            },
            "fail  v1beta2.custom.metrics.k8s.io",
            &["foreign-apiservice: ", "Service monitoring/prometheus-adapter", "kubectl apply -f manifests/01"],
            1,
        ),
        (
            |stage, _| stage.kubernetes.remove(&api_service("v1beta1")),
            "fail  v1beta1.custom.metrics.k8s.io",
            &["object-not-found: ", "kubectl apply -f manifests/01"],
            1,
        ),
        (
            |stage, _| {
                let mut api = stage.kubernetes.objects()[&api_service("v1beta2")].clone();
                let other = stage.kubernetes.ca().pem();
                let bytes = other.as_bytes();
                api["spec"]["caBundle"] = json!(sysdig_metrics_adapter::tls::base64(bytes));
                stage.kubernetes.object(&api_service("v1beta2"), api);
            },
            "fail  v1beta2.custom.metrics.k8s.io",
            &["kubernetes-unavailable: ", "unknown authority", "kubectl logs"],
            1,
        ),
        (
            |stage, _| available(stage, "v1beta1", "False", "dial tcp 10.0.0.1:10250: i/o timeout"),
            "fail  v1beta1.custom.metrics.k8s.io",
            &["kubernetes-unavailable: ", "i/o timeout", "kubectl get pods,endpointslices"],
            1,
        ),
        (
            |stage, _| {
                stage.kubernetes.remove("/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication");
            },
            "fail  front proxy",
            &["object-not-found: ", "custom-metrics-auth-reader"],
            1,
        ),
        (
            |stage, _| {
                stage.kubernetes.forbid("/api/v1/pods");
                stage.kubernetes.forbid("/apis/apps/v1/daemonsets");
            },
            "fail  own permissions",
            &["kubernetes-forbidden: ", "list pods., list daemonsets.apps: kubectl apply -f manifests/01"],
            1,
        ),
        (
            |stage, _| stage.kubernetes.authorize(|_| json!({ "allowed": false })),
            "fail  HPA controller",
            &["kubernetes-forbidden: ", "get *.custom.metrics.k8s.io: kubectl apply -f manifests/01"],
            1,
        ),
        (|stage, _| stage.sysdig.set_token("new"), "fail  Sysdig token", &["backend-unauthorized: ", "sysdig-api"], 1),
        (
            |stage, _| stage.sysdig.world().clock_offset = 45,
            "warn  clock",
            &["backend-invalid-answer: ", "over 30 s off", "NTP"],
            0,
        ),
        (
            |_, env| *env = with(env.clone(), &[("CLUSTER_NAME", "another")]),
            "fail  cluster name",
            &["no-data: ", "CLUSTER_NAME=NAME"],
            1,
        ),
        (
            |stage, _| {
                let (from_unix, until_unix) = (support::unix_now() - 7200, support::unix_now() - 3600);
                let old = support::Series::Since { value: 1.0, from_unix, until_unix };
                stage.sysdig.world().set("default", "kuard", "container.count", old);
            },
            "fail  agent",
            &["no-data: ", "in that time", "kubectl get pods"],
            1,
        ),
        (
            |stage, _| stage.kubernetes.object(KEDA, slot("v1beta1", "api")),
            "fail  v1beta1.external.metrics.k8s.io",
            &["foreign-apiservice: ", "kubectl delete apiservice v1beta1.external.metrics.k8s.io"],
            1,
        ),
        (
            |stage, env| {
                stage.kubernetes.object(KEDA, slot("v1beta1", "keda-metrics-apiserver"));
                *env = with(env.clone(), &[("EXTERNAL_METRICS", "true")]);
            },
            "fail  v1beta1.external.metrics.k8s.io",
            &["foreign-apiservice: ", "Service custom-metrics/keda-metrics-apiserver"],
            1,
        ),
        (
            |_, env| *env = with(env.clone(), &[("KUBERNETES_SERVICE_PORT", "1")]),
            "fail  front proxy",
            &["kubernetes-unavailable: "],
            1,
        ),
    ];
    for (break_it, line, parts, expected) in table {
        let setup = healthy();
        let mut env = setup.env();
        break_it(&setup, &mut env);
        let (code, out, bad) = doctor(&env);
        assert_eq!(code, expected, "{line}: {out}");
        let found = bad.iter().find(|it| it.starts_with(line)).unwrap_or_else(|| panic!("no {line}: {out}"));
        for part in parts {
            assert!(found.contains(part), "{part}: {found}");
        }
        assert!(!out.contains(TOKEN), "{out}");
    }
}

#[test]
fn doctor_asks_over_promql_where_that_is_the_backend() {
    let setup = healthy();
    let Some((_prometheus, mut env)) = promql(&setup) else { return };
    env.retain(|(name, _)| *name != "EXTERNAL_METRICS");
    assert_eq!(doctor(&env).0, 0, "{}", doctor(&env).1);
    let (code, _, bad) = doctor(&with(env, &[("CLUSTER_NAME", "another")]));
    assert!(code == 1 && bad.len() == 2 && bad.iter().all(|line| line.contains("no-data: ")), "{bad:?}");
}

/// What check says of an HPA of `kuard` with these metrics: exit code and findings.
#[track_caller]
fn check(env: &[(&'static str, &str)], hpa: &Value) -> (i32, Vec<String>) {
    let (code, out, err) = run(&with(Vec::new(), env), &["check"], hpa.to_string().as_bytes());
    assert_eq!(err, "");
    let mut lines: Vec<String> = out.lines().map(str::to_owned).collect();
    let summary = lines.pop().unwrap();
    assert!(summary.ends_with(&format!("findings: {}", lines.len())), "{out}");
    (code, lines)
}

#[test]
fn check_finds_what_is_wrong_with_an_hpa_without_asking_anybody() {
    let service = |metric: &str, target| object("Service", "v1", "kuard", metric, target);
    let labels = |key: &str, value: &str| json!({ "matchLabels": { key: value } });
    let over_time = |of: &str| labels("sysdig/time-aggregation", of);
    let expression =
        |operator: &str, values: Value| json!({ "matchExpressions": [{ "key": "a", "operator": operator, "values": values }] });
    let utilization = json!({ "type": "Utilization", "averageUtilization": 50 });
    let both = sum(service("a b", value("0")));
    let table: Vec<(Value, &str, &[&str])> = vec![
        (service(METRIC, value("4")), "", &[]),
        (service(METRIC, value("500m")), "", &[]),
        (service(METRIC, json!({ "type": "Value", "value": 4 })), "", &[]),
        (sum(service(METRIC, average("4"))), "", &[]),
        (object("Deployment", "apps/v1", "kuard", METRIC, value("4")), "", &[]),
        (object("Service", "v1", "deployment;kuard", METRIC, value("4")), "", &[]),
        (object("Namespace", "v1", "default", METRIC, value("4")), "", &[]),
        (pods(METRIC, average("4")), "", &[]),
        (sum(pods(METRIC, average("4"))), "", &[]),
        (external("orders_waiting", average("30")), "", &[]),
        (external("orders_waiting", value("30")), "", &[]),
        (selected(service(METRIC, value("4")), expression("In", json!(["b", "c"]))), "", &[]),
        (selected(service(METRIC, value("4")), expression("NotIn", json!(["b"]))), "", &[]),
        (selected(service(METRIC, value("4")), expression("Exists", json!([]))), "", &[]),
        (selected(service(METRIC, value("4")), expression("DoesNotExist", json!([]))), "", &[]),
        (json!({ "type": "Resource", "resource": { "name": "cpu", "target": utilization } }), "", &[]),
        (json!({ "type": "ContainerResource", "containerResource": { "name": "cpu" } }), "", &[]),
        (service("a b", value("4")), "", &["\"a b\" is not a metric id"]),
        (service("", value("4")), "", &["nothing is served at"]),
        (service("up{}", value("4")), "", &["is not a metric id"]),
        (object("Service", "v1", "Kuard", METRIC, value("4")), "", &["is not a Kubernetes name"]),
        (object("Service", "v1", "", METRIC, value("4")), "", &["an empty segment"]),
        (object("Service", "v1", "a/b", METRIC, value("4")), "", &["a character that cannot be in a name"]),
        (object("Service", "v1", "cron;kuard", METRIC, value("4")), "", &["is no workload type"]),
        (object("Deployment", "v1", "kuard", METRIC, value("4")), "", &["\"Deployment\" of apiVersion \"v1\""]),
        (object("Gateway", "gateway.networking.k8s.io/v1", "g", METRIC, value("4")), "", &["not-found: \"Gateway\""]),
        (object("Node", "v1", "n", METRIC, value("4")), "", &["nodes are read at nodes/NAME/METRIC"]),
        (selected(service(METRIC, value("4")), labels("sysdig/window", "1s")), "", &["at position 1"]),
        (selected(service(METRIC, value("4")), labels("a", "it's")), "", &["is not understood at position 1"]),
        (selected(service(METRIC, value("4")), expression("Near", json!(["b"]))), "", &["is not understood at position 1"]),
        (service(METRIC, value("0")), "", &["is \"0\": it must be a quantity above 0"]),
        (service(METRIC, value("-4")), "", &["must be a quantity above 0"]),
        (service(METRIC, json!({ "type": "Value", "value": -4 })), "", &["must be a quantity above 0"]),
        (service(METRIC, value("four")), "", &["must be a quantity above 0"]),
        (service(METRIC, value("1e999")), "", &["must be a quantity above 0"]),
        (service(METRIC, value("1e99999999999")), "", &["must be a quantity above 0"]),
        (service(METRIC, value("4mm")), "", &["must be a quantity above 0"]),
        (service(METRIC, json!({ "type": "Value", "averageValue": "4" })), "", &["is null: it must be a quantity above 0"]),
        (service(METRIC, Value::Null), "", &["the target of type \"\" is null"]),
        (service(METRIC, utilization), "", &["the target of type \"Utilization\" is null"]),
        (pods(METRIC, value("4")), "", &["or (not for Pods) Value"]),
        (sum(service(METRIC, value("4"))), "", &["a sum never converges"]),
        (sum(external("orders_waiting", value("4"))), "", &["a sum never converges"]),
        (service(METRIC, average("4")), "", &["divides by the pods what is divided by them already"]),
        (selected(service(METRIC, average("4")), labels("sysdig/group-aggregation", "max")), "", &["divided by them already"]),
        (service("orders_total", value("4")), "data", &["it counts up"]),
        (selected(service("orders_count", value("4")), over_time("max")), "data", &["it counts up"]),
        (selected(service("orders_total", value("4")), over_time("timeAvg")), "data", &[]),
        (service("orders_total", value("4")), "promql", &[]),
        (selected(service("orders_total", value("4")), over_time("max")), "promql", &["counts up: its max over time"]),
        (service("queue_depth", value("4")), "data", &[]),
        (service(METRIC, value("4")), "promql", &[]),
        (service("jvm.heap.used", value("4")), "promql", &["has no name in PromQL that is safe to assume"]),
        (json!({ "type": "Nonsense" }), "", &["\"Nonsense\" is no type of metric"]),
        (json!({}), "", &["\"\" is no type of metric"]),
        (json!("text"), "", &["\"\" is no type of metric"]),
        (both, "", &["is not a metric id"]),
    ];
    assert!(table.iter().filter(|row| !row.2.is_empty()).count() >= 25);
    for (metric, backend, expected) in table {
        let env = [("EXTERNAL_METRICS", "true"), ("SDC_BACKEND", backend)];
        let (code, lines) = check(&env, &hpa(vec![metric.clone()]));
        assert_eq!(lines.len(), expected.len(), "{metric}: {lines:#?}");
        assert_eq!(code, i32::from(!expected.is_empty()), "{metric}");
        for (line, part) in lines.iter().zip(expected) {
            assert!(line.starts_with("default/kuard metric 1 ") && line.contains(part), "{part}: {line}");
            assert!(line.contains("invalid-request: ") || line.contains("not-found: "), "{line}");
        }
    }
}

#[test]
fn check_wants_something_to_scale_up_from_zero_by() {
    let table = [
        (pods(METRIC, average("4")), true),
        (object("Deployment", "apps/v1", "kuard", METRIC, value("4")), true),
        (object("Service", "v1", "deployment;kuard", METRIC, value("4")), true),
        (object("Service", "v1", "kuard", METRIC, value("4")), true),
        (object("Service", "v1", "queue", METRIC, value("4")), false),
        (object("StatefulSet", "apps/v1", "kuard", METRIC, value("4")), false),
        (external("orders_waiting", average("30")), false),
    ];
    for (metric, found) in table {
        for (least, found) in [(0, found), (1, false)] {
            let mut hpa = hpa(vec![metric.clone()]);
            hpa["spec"]["minReplicas"] = json!(least);
            let (code, lines) = check(&[("EXTERNAL_METRICS", "true")], &hpa);
            assert_eq!((code == 1, lines.len()), (found, usize::from(found)), "{metric}: {lines:?}");
            assert!(!found || lines[0].contains("invalid-request: with minReplicas 0"), "{lines:?}");
        }
    }
}

#[test]
fn check_takes_a_list_and_counts() {
    let good = hpa(vec![object("Service", "v1", "kuard", METRIC, value("4")), external("x", average("1"))]);
    let mut bad = hpa(vec![pods(METRIC, average("4")), object("Service", "v1", "kuard", METRIC, value("0"))]);
    bad["metadata"]["name"] = json!("bad");
    let list = |items: Value| json!({ "kind": "List", "apiVersion": "v1", "items": items }).to_string();
    let (code, out, _) = run(&Vec::new(), &["check"], list(json!([good, bad])).as_bytes());
    let mistake =
        "the target of type \"Value\" is \"0\": it must be a quantity above 0, of type AverageValue, or (not for Pods) Value";
    let line = format!("default/bad metric 2 {METRIC} (Object): invalid-request: {mistake}\n");
    assert_eq!((code, out), (1, format!("{line}HPAs: 2, metrics of the adapter: 3, findings: 1\n")));
    let (code, out, _) = run(&Vec::new(), &["check"], list(json!([])).as_bytes());
    assert_eq!((code, out.as_str()), (0, "HPAs: 0, metrics of the adapter: 0, findings: 0\n"));
    let mut nowhere = hpa(vec![object("Service", "v1", "kuard", METRIC, value("0"))]);
    nowhere["metadata"] = json!({ "name": "kuard" });
    let (_, lines) = check(&[], &nowhere);
    assert!(lines.len() == 1 && lines[0].starts_with("default/kuard metric 1 "), "as kubectl apply has it: {lines:?}");
    let missing = json!({ "kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v2" });
    let (code, out, _) = run(&Vec::new(), &["explain", "-"], missing.to_string().as_bytes());
    assert_eq!((code, out.as_str()), (0, "HPAs: 1, metrics of the adapter: 0, findings: 0\n"));
    let (code, out, _) = run(&Vec::new(), &["check"], missing.to_string().as_bytes());
    assert_eq!((code, out.as_str()), (0, "HPAs: 1, metrics of the adapter: 0, findings: 0\n"));
}

#[test]
fn bad_input_ends_in_one_clear_line() {
    let stage = Stage::new();
    let large = vec![b' '; 50 * 1024 * 1024];
    let deep = "[".repeat(100_000);
    let old = json!({ "kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v1" }).to_string();
    let table: Vec<(&[u8], &str)> = vec![
        (b"", "is not JSON"),
        (b"not JSON", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{\"kind\":", "is not JSON"),
        (deep.as_bytes(), "is not JSON"),
        (&large, "of up to 16 MiB"),
        (b"{}", "holds \"{}\""),
        (b"[]", "holds \"[]\""),
        (b"null", "holds \"null\""),
        (b"7", "holds \"7\""),
        (b"{\"kind\":\"Pod\",\"apiVersion\":\"v1\"}", "is no HPA of autoscaling/v2"),
        (b"{\"kind\":\"List\",\"items\":[{\"kind\":\"Pod\"}]}", "is no HPA of autoscaling/v2"),
        (b"{\"kind\":\"List\",\"items\":[7]}", "holds \"7\""),
        (old.as_bytes(), "is no HPA of autoscaling/v2"),
    ];
    for (bytes, expected) in table {
        for arguments in [&["check"][..], &["explain", "-"]] {
            let (code, out, err) = run(&stage.env(), arguments, bytes);
            assert_eq!((code, out.as_str(), err.lines().count()), (2, "", 1), "{err}");
            assert!(err.contains(expected) && err.contains("kubectl get hpa -A -o json") && err.len() < 500, "{err}");
        }
    }
}

#[test]
fn wrong_arguments_and_settings_end_in_two_and_a_hint() {
    let stage = Stage::new();
    for arguments in
        [&["serve"][..], &["check", "x"], &["check", "--config"], &["doctor", "-v"], &["explain"], &["--help", "x"], &[""]]
    {
        let (code, out, err) = run(&stage.env(), arguments, b"");
        assert_eq!((code, out.as_str(), err.lines().count()), (2, "", 1), "{arguments:?}: {err}");
        assert!(err.contains("--help"), "{err}");
    }
    for name in ["kuard", "", "/", "default/"] {
        let (code, _, err) = run(&stage.env(), &["explain", name], b"");
        assert!(code == 2 && err.contains("NAMESPACE/HPA"), "{name}: {err}");
    }
    for arguments in [&["check"][..], &["doctor"], &["explain", "-"]] {
        let (code, out, err) = run(&with(stage.env(), &[("SDC_BACKEND", "x"), ("MAX_AGE", "1")]), arguments, b"{}");
        assert_eq!((code, out.as_str()), (2, ""));
        assert!(err.contains("SDC_BACKEND") && err.contains("MAX_AGE"), "{err}");
    }
    let (code, out, _) = run(&Vec::new(), &["--version"], b"");
    assert_eq!((code, out), (0, concat!("sysdig-metrics-adapter ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
    let (code, out, _) = run(&Vec::new(), &["--help"], b"");
    assert_eq!((code, out.as_str()), (0, include_str!("../src/help.txt")));
}

/// A definition for each of the commands, and a custom resource.
const DEFINITIONS: &str = r#"{
    "metrics": [
        { "name": "load", "metric": "net.http.request.count", "selector": "sysdig/group-aggregation=sum", "divideBy": 1000, "decimals": 2 },
        { "name": "waiting", "metric": "rabbitmq.messages" },
        { "name": "summed", "metric": "sum by ($by) (rate(orders_total{$matchers}[$window]))" }
    ],
    "resources": [{ "kind": "Queue", "plural": "queues", "apiVersion": "rabbitmq.com/v1", "label": "rabbitmq.queue" }]
}"#;

#[test]
fn the_commands_know_what_is_defined() {
    let (stage, dir) = (Stage::new(), TempDir::new());
    let file = dir.write("definitions.json", DEFINITIONS).display().to_string();
    let env = with(stage.env(), &[("CONFIG_FILE", &file)]);
    let metrics = || {
        let load = object("Service", "v1", "kuard", "load", value("4"));
        let waiting = object("Queue", "rabbitmq.com/v1", "orders", "waiting", average("30"));
        hpa(vec![load, waiting]).to_string()
    };
    let converges = "default/kuard metric 1 load (Object): invalid-request: a sum never converges against a Value";
    let other =
        "default/kuard metric 2 waiting (Object): not-found: \"Queue\" of apiVersion \"rabbitmq.com/v1\" has no metrics here";
    for (env, arguments, expected) in [
        (&stage.env(), &["check", "--config", &file][..], &[converges][..]),
        (&env, &["check"], &[converges]),
        (&stage.env(), &["check"], &[other]),
    ] {
        let (code, out, err) = run(env, arguments, metrics().as_bytes());
        let lines: Vec<_> = out.lines().collect();
        assert_eq!((code, err.as_str(), lines.len()), (1, "", expected.len() + 1), "{arguments:?}: {out}");
        assert!(lines.iter().zip(expected).all(|(line, start)| line.starts_with(start)), "{arguments:?}: {out}");
    }

    // Of two decimals, as the values.
    for (target, found) in [("10m", 0), ("50m", 0), ("5m", 1), ("1005m", 1)] {
        let of = hpa(vec![object("Service", "v1", "kuard", "load", average(target))]).to_string();
        let (code, out, _) = run(&env, &["check"], of.as_bytes());
        assert_eq!((code, out.matches("the target has more decimals").count()), (found, found as usize), "{target}: {out}");
    }

    // What a template makes of the pods of a Deployment nobody knows; a Service is their average.
    for (kind, version, found) in [("Deployment", "apps/v1", 0), ("Service", "v1", 1)] {
        let of = hpa(vec![object(kind, version, "kuard", "summed", average("30"))]).to_string();
        let (code, out, _) = run(&env, &["check"], of.as_bytes());
        assert_eq!((code, out.matches("divides by the pods").count()), (found, found as usize), "{kind}: {out}");
    }

    // Three pods of 50 each, in thousands.
    let by_sum = object("Service", "v1", "kuard", "load", average("50m"));
    let (code, out) = explain(&env, vec![by_sum]);
    assert_eq!((code, rows(&out, "value")[0]), (0, "150m for kuard (60 s to DATE, AGE s ago)"), "{out}");
    assert!(rows(&out, "replicas")[0].starts_with("3: 0.15 ÷ 0.05 = 3"), "{out}");

    let broken = dir.write("broken.json", "{\"metrics\": 1}").display().to_string();
    let mistake = format!("{broken}: invalid type: integer `1`, expected a sequence at line 1 column ");
    for (env, arguments) in [
        (&stage.env(), &["check", "--config", &broken][..]),
        (&with(stage.env(), &[("CONFIG_FILE", &broken)]), &["check"]),
        (&with(stage.env(), &[("CONFIG_FILE", &broken)]), &["explain", "-"]),
    ] {
        let (code, out, err) = run(env, arguments, metrics().as_bytes());
        assert_eq!((code, out.as_str()), (2, ""), "{err}");
        assert!(err.starts_with(&mistake) && err.lines().count() == 1, "{err}");
    }
    let (code, out, err) = run(&with(stage.env(), &[("CONFIG_FILE", &broken)]), &["doctor"], b"");
    assert!(code == 2 && out.is_empty() && err.starts_with(&mistake), "{out}{err}");
    let (code, out, _) = doctor(&with(healthy().env(), &[("CONFIG_FILE", &file)]));
    assert!(code == 0, "{out}");
}

#[test]
fn no_name_in_an_hpa_makes_a_line_of_its_own() {
    let hpa = hpa(vec![object("Service", "v1", "kuard", "m\u{1b}[31m\nHPAs: 1, findings: 0", value("4"))]);
    for (arguments, lines) in [(&["check"][..], 2), (&["explain", "-"], 4)] {
        let (code, out, _) = run(&Stage::new().env(), arguments, hpa.to_string().as_bytes());
        assert_eq!((code, out.lines().count()), (1, lines), "{out}");
        assert!(!out.contains('\u{1b}') && !out.lines().any(|line| line.starts_with("HPAs: 1, findings")), "{out}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let stage = Stage::new();
    let hpas: Vec<Value> = (0..2000).map(|_| hpa(vec![pods(METRIC, value("0"))])).collect();
    let list = json!({ "kind": "List", "apiVersion": "v1", "items": hpas }).to_string();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
        .arg("check")
        .envs(stage.env())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(1), ""));
}
