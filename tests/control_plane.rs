//! The walk-through and the failures that users fear, on a real control plane.
//!
//! One test, since its steps build on each other; it takes about ten minutes, for most of which autoscalers
//! wait before they scale down, and certificates are looked at once a minute. Steps are
//! printed as they pass: `cargo test --test control_plane -- --nocapture`.
#![expect(clippy::print_stderr, reason = "the steps are shown to who runs this by hand")]

#[path = "control_plane/load.rs"]
mod load;
#[path = "support/prometheus.rs"]
mod prometheus;
mod support;
#[path = "control_plane/trust.rs"]
mod trust;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use load::{Backend, What, autoscaler, object};
use serde_json::{Value, json};
use support::adapter::Adapter;
use support::control_plane::{ControlPlane, assets, free_port, repository};
use support::sysdig::{Fault, Sysdig};
use support::wire::{Parties, replay_reference, replay_requests};
use support::{CLUSTER, Ca, Client, METRIC, READ, TOKEN};

/// What the walk-through shows for `kubectl apply -f 01-sysdig-metrics-rbac.yml`, in its order.
const WALK_THROUGH_OBJECTS: [&str; 10] = [
    "namespace/custom-metrics created",
    "serviceaccount/custom-metrics-apiserver created",
    "clusterrolebinding.rbac.authorization.k8s.io/custom-metrics:system:auth-delegator created",
    "rolebinding.rbac.authorization.k8s.io/custom-metrics-auth-reader created",
    "clusterrole.rbac.authorization.k8s.io/custom-metrics-resource-reader created",
    "clusterrolebinding.rbac.authorization.k8s.io/custom-metrics-apiserver-resource-reader created",
    "clusterrole.rbac.authorization.k8s.io/custom-metrics-getter created",
    "clusterrolebinding.rbac.authorization.k8s.io/hpa-custom-metrics-getter created",
    "service/api created",
    "apiservice.apiregistration.k8s.io/v1beta1.custom.metrics.k8s.io created",
];

/// What the component `external-metrics` registers.
const EXTERNAL_OBJECTS: [&str; 5] = [
    "apiservice.apiregistration.k8s.io/v1beta1.external.metrics.k8s.io created",
    "clusterrole.rbac.authorization.k8s.io/external-metrics-cabundle created",
    "clusterrolebinding.rbac.authorization.k8s.io/external-metrics-cabundle created",
    "clusterrole.rbac.authorization.k8s.io/external-metrics-getter created",
    "clusterrolebinding.rbac.authorization.k8s.io/hpa-external-metrics-getter created",
];

/// What an autoscaler says of itself that knows how many replicas it wants.
const SCALES: &str = "the HPA was able to successfully calculate a replica count";

const EXTERNAL: &str = "components/external-metrics/external-metrics.yml";
const EXTERNAL_API: &str = "/apis/external.metrics.k8s.io/v1beta1";

/// What is set besides the address of everything. Readings are refreshed as often as the autoscaler asks here, so that
/// a changed load shows at once; and an outage is not waited for longer than it must.
const REMEMBERING: [(&str, &str); 2] = [("REFRESH_INTERVAL", "1s"), ("MAX_AGE", "60s")];
/// Every read asks Sysdig, so that every failure shows at once.
const FORGETFUL: [(&str, &str); 1] = [("REFRESH_INTERVAL", "0s")];

struct Stage {
    plane: ControlPlane,
    sysdig: Sysdig,
    backend: Backend,
    port: u16,
    /// The APIServices there are.
    slots: Vec<&'static str>,
    adapter: Option<Adapter>,
    environment: Vec<(&'static str, String)>,
    /// Since when the API server has no reason to complain about us, and how long its log was then.
    quiet: (Instant, usize),
}

#[test]
fn the_walk_through_and_the_failures_users_fear() {
    let assets = match assets() {
        Ok(assets) => assets,
        Err(skipped) => return skip(&skipped),
    };
    let started = Instant::now();
    let mut stage = Stage {
        plane: ControlPlane::start(assets),
        sysdig: Sysdig::start(TOKEN),
        backend: Backend::Data,
        port: free_port(),
        slots: vec!["v1beta1.custom.metrics.k8s.io", "v1beta2.custom.metrics.k8s.io"],
        adapter: None,
        environment: Vec::new(),
        quiet: (started, 0),
    };
    step("version", || eprintln!("  {}", stage.plane.run(&["version"]).lines().last().unwrap_or_default()));
    step("the target and the registration", || stage.install());
    stage.start_adapter(&REMEMBERING);
    step("the first read", || stage.first_read());
    step("discovery through the API server", || stage.discovery());
    step("what was captured, and what a reference answers", || stage.contract());
    let by_service = std::fs::read_to_string(repository("manifests/03-kuard-hpa.yml")).unwrap();
    step("an HPA on the Service", || stage.closed_loop(&by_service, What::Requests));
    let (average, each) = (json!({ "name": METRIC }), json!({ "type": "Value", "value": "4" }));
    let sum = json!({ "name": METRIC, "selector": { "matchLabels": { "sysdig/group-aggregation": "sum" } } });
    let divided = json!({ "type": "AverageValue", "averageValue": "4" });
    let selected = json!({ "name": METRIC, "selector": { "matchExpressions": [
        { "key": "container.name", "operator": "In", "values": ["kuard", "web"] },
        { "key": "kubernetes.workload.type", "operator": "NotIn", "values": ["job", "daemonset"] },
        { "key": "kubernetes.deployment.name", "operator": "Exists" },
        { "key": "kubernetes.statefulSet.name", "operator": "DoesNotExist" },
    ] } });
    let pods = json!({ "type": "Pods", "pods": { "metric": average, "target": divided } });
    for (name, metric, what) in [
        ("the legacy name", object(["Service", "v1", "deployment;kuard"], &average, &each), What::Requests),
        ("the Deployment", object(["Deployment", "apps/v1", "kuard"], &average, &each), What::Requests),
        ("the Service, dividing a sum by itself", object(["Service", "v1", "kuard"], &sum, &divided), What::Requests),
        ("its own pods", pods.clone(), What::Requests),
        (
            "the Service's own containers, by expressions",
            object(["Service", "v1", "kuard"], &selected, &each),
            What::RequestsBehindProxies,
        ),
    ] {
        step(&format!("an HPA on {name}"), || stage.closed_loop(&autoscaler(&metric), what));
    }
    step("who may read", || stage.authorization());
    step("tokens, authorities and certificates change under load", || stage.rotations());
    step("an outage is felt once the last value is too old", || stage.outage(&by_service));
    step("three minutes without an error about us in the API server's log", || {
        stage.assert_quiet(Duration::from_secs(180));
    });
    step("the adapter is killed and started again", || stage.restart());
    step("what users fear", || stage.failures());
    stage.assert_quiet(Duration::ZERO);
    step("external metrics are registered", || stage.register_external());
    let external = |name: &str| json!({ "type": "External", "external": { "metric": queue(name), "target": divided } });
    let by_queue = external(stage.backend.queue());
    step("an HPA on an external metric", || stage.closed_loop(&autoscaler(&by_queue), What::Queue));
    step("the commands say why", || stage.commands(&autoscaler(&by_queue), What::Queue));
    stage.assert_quiet(Duration::from_secs(70));
    match prometheus::missing() {
        Some(skipped) => skip(skipped),
        None => {
            step("the adapter asks in PromQL", || stage.ask_in_promql());
            let by_queue = external(stage.backend.queue());
            for (name, hpa, what) in [
                ("the Service", by_service, What::Requests),
                ("its own pods", autoscaler(&pods), What::Requests),
                ("an external metric", autoscaler(&by_queue), What::Queue),
            ] {
                step(&format!("in PromQL, an HPA on {name}"), || stage.closed_loop(&hpa, what));
            }
            step("in PromQL, the commands say why", || stage.commands(&autoscaler(&pods), What::Requests));
            stage.assert_quiet(Duration::ZERO);
        }
    }
    step("uninstalling", || stage.uninstall());
    eprintln!("all of it: {:.0} s", started.elapsed().as_secs_f64());
}

/// Says so to whoever runs this; not by eprintln!, which a test that passes keeps for itself.
fn skip(why: &str) {
    let _ = writeln!(std::io::stderr(), "{why}");
}

/// The queue `mail` without its zone `c`.
fn queue(name: &str) -> Value {
    json!({ "name": name, "selector": {
        "matchLabels": { "queue": "mail", "sysdig/group-aggregation": "sum" },
        "matchExpressions": [
            { "key": "zone", "operator": "NotIn", "values": ["c", "d"] },
            { "key": "zone", "operator": "Exists" },
        ],
    } })
}

fn step(name: &str, work: impl FnOnce()) {
    let started = Instant::now();
    eprintln!("{name}");
    work();
    eprintln!("  passed after {:.1} s", started.elapsed().as_secs_f64());
}

impl Stage {
    fn manifest(&self, name: &str) -> String {
        self.plane.run(&["apply", "-f", &repository("manifests").join(name).display().to_string()])
    }

    fn install(&self) {
        let plane = &self.plane;
        let applied = self.manifest("00-kuard.yml");
        assert_eq!(applied.lines().collect::<Vec<_>>(), ["deployment.apps/kuard created", "service/kuard created"]);
        plane.until("three pods", || {
            plane.run_pods(&plane.json(&["get", "pods", "-o", "json"]));
            plane.json(&["get", "deployment", "kuard", "-o", "json"])["status"]["readyReplicas"] == 3
        });
        let applied = self.manifest("01-sysdig-metrics-rbac.yml");
        let lines: Vec<&str> = applied.lines().collect();
        for expected in WALK_THROUGH_OBJECTS {
            assert!(lines.contains(&expected), "{expected} is not in {applied}");
        }
        assert!(lines.contains(&"apiservice.apiregistration.k8s.io/v1beta2.custom.metrics.k8s.io created"), "{applied}");
        self.repoint();
        let refused = plane.refused(&["get", "--raw", READ]);
        assert!(refused.contains("ServiceUnavailable"), "{refused}");
        let secret = format!("--from-literal=access-key={TOKEN}");
        plane.run(&["create", "secret", "generic", &secret, "-n", "custom-metrics", "sysdig-api"]);
        let applied = self.manifest("02-sysdig-metrics-server.yml");
        assert_eq!(applied.trim(), "deployment.apps/custom-metrics-apiserver created");
    }

    /// There is no kubelet and no kube-proxy, so the Service leads to this machine.
    fn repoint(&self) {
        let port = self.port;
        let service = json!({ "spec": {
            "type": "ExternalName", "externalName": "localhost", "clusterIP": "", "clusterIPs": null, "selector": null,
            "ports": [{ "name": "https", "port": port, "protocol": "TCP" }],
        } });
        self.plane.run(&["patch", "service", "api", "-n", "custom-metrics", "--type=merge", "-p", &service.to_string()]);
        self.slots.iter().for_each(|name| self.lead_here(name));
    }

    fn lead_here(&self, slot: &str) {
        let patch = json!({ "spec": { "service": { "port": self.port } } }).to_string();
        self.plane.run(&["patch", "apiservice", slot, "--type=merge", "-p", &patch]);
    }

    fn start_adapter(&mut self, settings: &[(&'static str, &str)]) {
        self.adapter = None;
        let directory = self.plane.service_account_dir("custom-metrics", "custom-metrics-apiserver");
        let endpoint = match &self.backend {
            Backend::Data => self.sysdig.url(),
            Backend::PromQl(prometheus, _) => prometheus.url(),
        };
        let mut environment = vec![
            ("LISTEN_ADDR", format!("127.0.0.1:{}", self.port)),
            ("KUBERNETES_SERVICE_HOST", "127.0.0.1".to_owned()),
            ("KUBERNETES_SERVICE_PORT", self.plane.port.to_string()),
            ("SERVICE_ACCOUNT_DIR", directory.display().to_string()),
            ("SDC_ENDPOINT", endpoint),
            ("SDC_TOKEN", TOKEN.to_owned()),
            ("SDC_TIMEOUT", "1s".to_owned()),
            ("CLUSTER_NAME", CLUSTER.to_owned()),
        ];
        environment.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
        self.environment.clone_from(&environment);
        let command = Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"));
        self.adapter = Some(Adapter::start(command, &environment));
        for slot in &self.slots {
            self.plane.until(&format!("{slot} is available"), || {
                let slot = self.plane.json(&["get", "apiservice", slot, "-o", "json"]);
                let conditions = slot["status"]["conditions"].as_array().cloned().unwrap_or_default();
                conditions.iter().any(|it| it["type"] == "Available" && it["status"] == "True")
            });
        }
        self.quiet = (Instant::now(), self.plane.log("kube-apiserver").len());
    }

    fn first_read(&self) {
        self.load(0.0);
        let list = self.plane.json(&["get", "--raw", READ]);
        assert_eq!(list["kind"], "MetricValueList");
        assert_eq!(list["apiVersion"], "custom.metrics.k8s.io/v1beta1");
        assert_eq!(list["metadata"]["selfLink"], READ);
        let item = &list["items"][0];
        let object = json!({ "kind": "Service", "namespace": "default", "name": "kuard", "apiVersion": "v1" });
        assert_eq!((&item["describedObject"], &item["metricName"]), (&object, &json!(METRIC)));
        assert_eq!(item["value"], "0", "an idle service is 0");
        self.load(20.25);
        self.plane.until("what has changed is read", || self.plane.json(&["get", "--raw", READ])["items"][0]["value"] == "6750m");
    }

    fn discovery(&self) {
        let plane = &self.plane;
        plane.until("kubectl api-versions lists both", || {
            let versions = plane.run(&["api-versions"]);
            ["v1beta1", "v1beta2"].iter().all(|version| versions.contains(&format!("custom.metrics.k8s.io/{version}")))
        });
        let resources = plane.kubectl(&["api-resources"]);
        assert!(resources.status.success() && resources.stderr.is_empty(), "{resources:?}");
        let list = plane.json(&["get", "--raw", "/apis/custom.metrics.k8s.io/v1beta1"]);
        let names: Vec<&str> = list["resources"].as_array().unwrap().iter().filter_map(|it| it["name"].as_str()).collect();
        assert!(names.contains(&"services/net.http.request.count"), "{names:?}");
        plane
            .until("the OpenAPI document is merged", || plane.run(&["get", "--raw", "/openapi/v2"]).contains("readSysdigMetric"));
        for version in ["v1beta1", "v1beta2"] {
            plane.until(&format!("the OpenAPI document of {version} is passed on"), || {
                let path = format!("/openapi/v3/apis/custom.metrics.k8s.io/{version}");
                plane.kubectl(&["get", "--raw", &path]).status.success()
            });
        }
    }

    fn contract(&self) {
        let plane = &self.plane;
        self.load(24.0);
        plane.run(&["create", "serviceaccount", "admin"]);
        let grant = ["--clusterrole=cluster-admin", "--serviceaccount=default:admin"];
        plane.run(&["create", "clusterrolebinding", "all-to-admin", grant[0], grant[1]]);
        let shows = |ca: &Ca, name: &str| Client::new(self.port, Some(&ca.issue_client(name, &[])));
        let parties = Parties {
            front_proxy: self.aggregator(&plane.front_proxy_ca),
            anonymous: Client::new(self.port, None),
            rogue: self.aggregator(&Ca::new("rogue")),
            joe: shows(&plane.ca, "joe"),
            admin: shows(&plane.ca, "admin"),
            plain_token: plane.token("default", "default").0,
            admin_token: plane.token("default", "admin").0,
        };
        let captured = replay_requests(&parties.front_proxy);
        let compared = replay_reference(&parties.front_proxy, Some(&parties));
        eprintln!("  {captured} captured requests answered, {compared} cases of the reference compared");
    }

    /// The autoscaler notices nothing for as long as the last value may be served, and holds then.
    fn outage(&self, hpa: &str) {
        self.plane.apply(hpa);
        self.settle(24.0, 6);
        self.sysdig.fail(Fault::Status(500));
        self.plane.until("the last value is too old", || {
            assert_eq!(self.replicas(), 6);
            let conditions = self.conditions();
            // MAX_AGE is 60 s.
            let is_late = |it: &String| it.contains("Sysdig fails") && it.contains("the last value is 6");
            assert!(
                conditions.iter().any(|it| is_late(it) || it.contains(SCALES)),
                "a value that is not too old stands in: {conditions:?}"
            );
            conditions.iter().any(is_late)
        });
        self.sysdig.heal();
        self.until_described(SCALES);
        assert_eq!(self.replicas(), 6);
    }

    fn failures(&self) {
        assert_eq!(self.replicas(), 6);
        let table = [
            (Fault::Empty, "is CLUSTER_NAME the name that Sysdig shows"),
            (Fault::Status(500), "Sysdig fails"),
            (Fault::Status(429), "Sysdig limits the rate"),
            (Fault::Status(401), "Sysdig does not accept the API token"),
            (Fault::Garbage, "not the JSON expected"),
            (Fault::Truncated, "ends early"),
            (Fault::Hang, "did not answer within SDC_TIMEOUT"),
            (Fault::HangInBody, "did not answer within SDC_TIMEOUT"),
            (Fault::Reset, "cannot be reached"),
            (Fault::Stale(600), "over MAX_AGE"),
        ];
        for (fault, words) in table {
            let name = format!("{fault:?}");
            self.sysdig.fail(fault);
            self.until_described(words);
            assert_eq!(self.replicas(), 6, "{name} must not scale");
            self.sysdig.heal();
            eprintln!("  {name}: {words:?}, 6 replicas");
        }
        self.partly_seen();
        self.sysdig.set_token("another");
        self.until_described("kubectl create secret generic");
        let resources = self.plane.kubectl(&["api-resources"]);
        assert!(resources.status.success() && resources.stderr.is_empty(), "{resources:?}");
        self.namespace_comes_and_goes("while-sysdig-is-down");
        assert_eq!(self.replicas(), 6);
        self.sysdig.set_token(TOKEN);
        self.until_described(SCALES);
        assert_eq!(self.replicas(), 6);
        self.plane.run(&["delete", "hpa", "kuard-autoscaler"]);
    }

    /// Silence is no idleness while one of the Service's pods is not seen at all.
    fn partly_seen(&self) {
        {
            let mut world = self.sysdig.world();
            world.unset("default", "kuard", METRIC);
            let last = world.containers.iter().rposition(|it| it.label("container.name") == Some("kuard")).unwrap();
            world.containers.remove(last);
        }
        self.until_described("it sees 5 of its 6 ready pods");
        assert_eq!(self.replicas(), 6);
        self.load(24.0);
        self.until_described(SCALES);
        eprintln!("  a pod is not seen: 6 replicas");
    }

    fn namespace_comes_and_goes(&self, name: &str) {
        self.plane.run(&["create", "namespace", name]);
        self.plane.run(&["get", "namespace", name, "-o", "jsonpath={.status.conditions}"]);
        self.plane.run(&["delete", "namespace", name, "--timeout=60s"]);
    }

    /// With the autoscaler that there is.
    fn restart(&mut self) {
        self.adapter = None;
        self.until_described("unable to");
        assert_eq!(self.replicas(), 6);
        self.start_adapter(&FORGETFUL);
        self.until_described(SCALES);
        assert_eq!(self.replicas(), 6);
    }

    /// What the component holds, and its variable; there is no pod here that would have it.
    fn register_external(&mut self) {
        let kustomization = repository("manifests/components/external-metrics/kustomization.yaml");
        let kustomization = std::fs::read_to_string(kustomization).unwrap();
        assert!(kustomization.contains("- name: EXTERNAL_METRICS\n                    value: \"true\"\n"));
        let applied = self.manifest(EXTERNAL);
        assert_eq!(applied.lines().collect::<Vec<_>>(), EXTERNAL_OBJECTS);
        let slot = "v1beta1.external.metrics.k8s.io";
        self.lead_here(slot);
        self.slots.push(slot);
        self.start_adapter(&[&REMEMBERING[..], &[("EXTERNAL_METRICS", "true")]].concat());
        let plane = &self.plane;
        let slot = plane.json(&["get", "apiservice", slot, "-o", "json"]);
        let kept = plane.json(&["get", "secret", "custom-metrics-apiserver-certificate", "-n", "custom-metrics", "-o", "json"]);
        assert!(slot["spec"]["caBundle"].is_string(), "{slot}");
        assert_eq!(slot["spec"]["caBundle"], kept["data"]["ca.crt"], "the adapter writes its authority there");
        plane.until("kubectl api-versions lists it", || {
            plane.run(&["api-versions"]).lines().any(|line| line == "external.metrics.k8s.io/v1beta1")
        });
        let resources = plane.kubectl(&["api-resources"]);
        assert!(resources.status.success() && resources.stderr.is_empty(), "{resources:?}");
        plane.until("its OpenAPI document is passed on", || {
            plane.kubectl(&["get", "--raw", &format!("/openapi/v3{EXTERNAL_API}")]).status.success()
        });
        self.load_of(What::Queue, 24.0);
        let metric = format!("{EXTERNAL_API}/namespaces/default/{}", self.backend.queue());
        let table = [
            ("?labelSelector=queue%3Dprint", "1k"),
            ("?labelSelector=queue%3Dmail%2Czone+in+%28a%2Cb%29%2Csysdig%2Fgroup-aggregation%3Dsum", "24"),
            ("?labelSelector=queue%3Dmail%2Czone+notin+%28c%29", "12"),
        ];
        for (selector, value) in table {
            let list = plane.json(&["get", "--raw", &format!("{metric}{selector}")]);
            assert_eq!(list["kind"], "ExternalMetricValueList");
            assert_eq!(list["items"].as_array().map(Vec::len), Some(1), "{list}");
            assert_eq!(
                (&list["items"][0]["metricName"], &list["items"][0]["value"]),
                (&json!(self.backend.queue()), &json!(value)),
                "{selector}"
            );
        }
        let refused = plane.refused(&["get", "--raw", &format!("{metric}?labelSelector=queue%3Dnone")]);
        assert!(refused.contains("NotFound") && refused.contains("has no sample of"), "{refused}");
        // Whoever may read custom metrics may not read these.
        let refused = plane.refused(&["get", "--raw", &metric, "--as=joe"]);
        assert!(refused.contains("forbidden") && refused.contains("external.metrics.k8s.io"), "{refused}");
        self.namespace_comes_and_goes("with-external-metrics");
    }

    /// Exit code and all output of a command, as it would run in the pod.
    fn command(&self, arguments: &[&str], stdin: &str) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"));
        command.env_clear().envs(self.environment.iter().map(|(name, value)| (*name, value))).args(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat())
    }

    fn commands(&mut self, hpa: &str, what: What) {
        const DOCTOR_RBAC: &str = "components/doctor-rbac/doctor-rbac.yml";
        let name = "default/kuard-autoscaler";
        self.plane.apply(hpa);
        self.settle_of(what, 24.0, 6);
        let plane = &self.plane;
        let all = plane.run(&["get", "hpa", "-A", "-o", "json"]);
        assert_eq!(self.command(&["check"], &all).0, Some(0), "{:?}", self.command(&["check"], &all));

        let (code, refused) = self.command(&["explain", name], "");
        assert_eq!(code, Some(2), "{refused}");
        assert!(refused.contains("kubernetes-forbidden") && refused.contains("components/doctor-rbac"), "{refused}");
        self.manifest(DOCTOR_RBAC);
        plane.until("explain may read HPAs", || !self.command(&["explain", name], "").1.contains("forbidden"));
        let (code, out) = self.command(&["explain", name], "");
        assert_eq!(code, Some(0), "{out}");
        let replicas = out.lines().find_map(|line| line.trim().strip_prefix("replicas: ")).unwrap_or_default();
        assert!(replicas.trim().starts_with("6: "), "as the HPA itself has it: {out}");
        assert!(!out.contains(TOKEN), "{out}");

        let (code, out) = self.command(&["doctor"], "");
        assert!(code == Some(0) && out.lines().all(|line| line.starts_with("ok ")), "{out}");
        // Another authority; within a minute the adapter writes its own again. The API server complains meanwhile, as it should.
        self.assert_quiet(Duration::ZERO);
        let other = sysdig_metrics_adapter::tls::base64(plane.front_proxy_ca.pem());
        let patch = format!(r#"[{{"op":"replace","path":"/spec/caBundle","value":"{other}"}}]"#);
        let api = "v1beta1.custom.metrics.k8s.io";
        plane.run(&["patch", "apiservice", api, "--type=json", "-p", &patch]);
        let failed = format!("fail  {api} ");
        plane.until("doctor sees a caBundle that verifies nothing", || {
            let (_, out) = self.command(&["doctor"], "");
            out.lines().any(|line| line.starts_with(&failed) && line.contains("x509"))
        });
        plane.until("it is mended", || self.command(&["doctor"], "").0 == Some(0));
        self.environment.push(("CLUSTER_NAME", "another".to_owned()));
        let (code, out) = self.command(&["doctor"], "");
        self.environment.pop();
        let failed = out.lines().filter(|line| line.starts_with("fail  cluster name ") || line.starts_with("fail  agent "));
        assert!(code == Some(1) && failed.count() == 2, "{out}");
        self.plane.run(&["delete", "-f", &repository("manifests").join(DOCTOR_RBAC).display().to_string()]);
        self.settle_of(what, 0.0, 3);
        self.quiet.1 = self.plane.log("kube-apiserver").len();
        self.plane.run(&["delete", "hpa", "kuard-autoscaler"]);
    }

    fn ask_in_promql(&mut self) {
        self.backend = Backend::prometheus();
        self.load(24.0);
        let settings = [("EXTERNAL_METRICS", "true"), ("SDC_BACKEND", "promql")];
        self.start_adapter(&[&REMEMBERING[..], &settings].concat());
        assert_eq!(self.plane.json(&["get", "--raw", READ])["items"][0]["value"], "8");
    }

    /// That the API server has had no reason to complain about us since the adapter is there, and over such a time.
    fn assert_quiet(&self, time: Duration) {
        std::thread::sleep(time.saturating_sub(self.quiet.0.elapsed()));
        let log = self.plane.log("kube-apiserver");
        let about_us = |line: &&str| line.starts_with('E') && line.contains("metrics.k8s.io");
        let errors: Vec<&str> = log[self.quiet.1..].lines().filter(about_us).collect();
        assert!(errors.is_empty(), "{}", errors.join("\n"));
    }

    fn uninstall(&mut self) {
        self.namespace_comes_and_goes("before");
        self.plane.run(&[&["delete", "apiservice"], &self.slots[..]].concat());
        self.namespace_comes_and_goes("without-slots");
        self.adapter = None;
        for name in [EXTERNAL, "02-sysdig-metrics-server.yml", "01-sysdig-metrics-rbac.yml", "00-kuard.yml"] {
            let file = repository("manifests").join(name).display().to_string();
            self.plane.run(&["delete", "-f", &file, "--ignore-not-found", "--timeout=60s"]);
            self.namespace_comes_and_goes("after-a-file");
        }
        let left = self.plane.json(&["get", "clusterrole,clusterrolebinding", "-o", "json"]);
        let names = left["items"].as_array().unwrap().iter().map(|it| &it["metadata"]["name"]);
        let ours = |name: &str| name.contains("custom-metrics") || name.contains("external-metrics");
        assert_eq!(names.filter(|name| name.as_str().is_some_and(ours)).count(), 0);
    }
}
