//! The walk-through and the failures that users fear, on a real control plane.
//!
//! One test, since starting a control plane takes longer than all that is tried on it. Steps are
//! printed as they pass: `cargo test --test control_plane -- --nocapture`.
#![expect(clippy::print_stderr, reason = "the steps are shown to who runs this by hand")]

mod support;

use std::io::Write;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::adapter::Adapter;
use support::clock::poll;
use support::control_plane::{ControlPlane, assets, free_port, repository};
use support::dir::replace;
use support::sysdig::{Fault, Sysdig};
use support::wire::{Parties, replay_reference, replay_requests};
use support::{Ca, Client, FRONT_PROXY, HPA, HPA_GROUPS, LeafOptions, METRIC, READ};

const TOKEN: &str = "test-token";

/// The ConfigMap that says whose certificate speaks for users.
const TRUST: &str = "extension-apiserver-authentication";

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

struct Stage {
    plane: ControlPlane,
    sysdig: Sysdig,
    port: u16,
    adapter: Option<Adapter>,
}

#[test]
fn the_walk_through_and_the_failures_users_fear() {
    let assets = match assets() {
        Ok(assets) => assets,
        Err(skipped) => {
            // Not by eprintln!, which a test that passes keeps for itself.
            let _ = writeln!(std::io::stderr(), "{skipped}");
            return;
        }
    };
    let started = Instant::now();
    let mut stage =
        Stage { plane: ControlPlane::start(assets), sysdig: Sysdig::start(TOKEN), port: free_port(), adapter: None };
    step("version", || eprintln!("  {}", stage.plane.run(&["version"]).lines().last().unwrap_or_default()));
    step("the target and the registration", || stage.install());
    stage.start_adapter();
    let (quiet_since, quiet_from) = (Instant::now(), stage.plane.log("kube-apiserver").len());
    step("the first read", || stage.first_read());
    step("discovery through the API server", || stage.discovery());
    step("what was captured, and what a reference answers", || stage.contract());
    let by_service = std::fs::read_to_string(repository("manifests/03-kuard-hpa.yml")).unwrap();
    step("an HPA on the Service", || stage.closed_loop(&by_service));
    let object = |[kind, version, name]: [&str; 3], metric: &Value, target: &Value| {
        let described = json!({ "kind": kind, "apiVersion": version, "name": name });
        json!({ "type": "Object", "object": { "describedObject": described, "metric": metric, "target": target } })
    };
    let hpa = |metric: Value| {
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
    };
    let (average, each) = (json!({ "name": METRIC }), json!({ "type": "Value", "value": "4" }));
    let sum = json!({ "name": METRIC, "selector": { "matchLabels": { "sysdig/group-aggregation": "sum" } } });
    let divided = json!({ "type": "AverageValue", "averageValue": "4" });
    for (name, metric) in [
        ("the legacy name", object(["Service", "v1", "deployment;kuard"], &average, &each)),
        ("the Deployment", object(["Deployment", "apps/v1", "kuard"], &average, &each)),
        ("the Service, dividing a sum by itself", object(["Service", "v1", "kuard"], &sum, &divided)),
        ("its own pods", json!({ "type": "Pods", "pods": { "metric": average, "target": divided } })),
    ] {
        step(&format!("an HPA on {name}"), || stage.closed_loop(&hpa(metric)));
    }
    step("what users fear", || stage.failures(&by_service));
    step("who may read", || stage.authorization());
    step("tokens, authorities and certificates change under load", || stage.rotations());
    step("three minutes without an error about us in the API server's log", || {
        stage.quiet_log(quiet_since, quiet_from);
    });
    step("the adapter is killed and started again", || stage.restart());
    step("uninstalling", || stage.uninstall());
    eprintln!("all of it: {:.0} s", started.elapsed().as_secs_f64());
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
            plane.run_pods("default");
            plane.json(&["get", "deployment", "kuard", "-o", "json"])["status"]["readyReplicas"] == 3
        });
        let applied = self.manifest("01-sysdig-metrics-rbac.yml");
        let lines: Vec<&str> = applied.lines().collect();
        for expected in WALK_THROUGH_OBJECTS {
            assert!(lines.contains(&expected), "{expected} is not in {applied}");
        }
        assert!(
            lines.contains(&"apiservice.apiregistration.k8s.io/v1beta2.custom.metrics.k8s.io created"),
            "{applied}"
        );
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
        self.plane.run(&[
            "patch",
            "service",
            "api",
            "-n",
            "custom-metrics",
            "--type=merge",
            "-p",
            &service.to_string(),
        ]);
        let slot = json!({ "spec": { "service": { "port": port } } }).to_string();
        for version in ["v1beta1", "v1beta2"] {
            let name = format!("{version}.custom.metrics.k8s.io");
            self.plane.run(&["patch", "apiservice", &name, "--type=merge", "-p", &slot]);
        }
    }

    fn start_adapter(&mut self) {
        let directory = self.plane.service_account_dir("custom-metrics", "custom-metrics-apiserver");
        let environment = [
            ("LISTEN_ADDR", format!("127.0.0.1:{}", self.port)),
            ("KUBERNETES_SERVICE_HOST", "127.0.0.1".to_owned()),
            ("KUBERNETES_SERVICE_PORT", self.plane.port.to_string()),
            ("SERVICE_ACCOUNT_DIR", directory.display().to_string()),
            ("SDC_ENDPOINT", self.sysdig.url()),
            ("SDC_TOKEN", TOKEN.to_owned()),
            ("SDC_TIMEOUT", "1s".to_owned()),
            ("CLUSTER_NAME", "demo".to_owned()),
        ];
        let command = Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"));
        self.adapter = Some(Adapter::start(command, &environment));
        self.available();
    }

    fn available(&self) {
        for version in ["v1beta1", "v1beta2"] {
            let condition = format!("{version}.custom.metrics.k8s.io is available");
            self.plane.until(&condition, || {
                let name = format!("{version}.custom.metrics.k8s.io");
                let slot = self.plane.json(&["get", "apiservice", &name, "-o", "json"]);
                let conditions = slot["status"]["conditions"].as_array().cloned().unwrap_or_default();
                conditions.iter().any(|it| it["type"] == "Available" && it["status"] == "True")
            });
        }
    }

    /// `total` requests per second over the pods there are, as Sysdig sees it.
    fn load(&self, total: f64) -> usize {
        self.plane.run_pods("default");
        let pods = self.plane.json(&["get", "pods", "-l", "app=kuard", "-o", "json"]);
        let count = pods["items"].as_array().unwrap().len();
        let mut world = self.sysdig.world();
        world.containers.clear();
        world.deployment("demo", "default", "other", Some("other"), 1, &[(METRIC, 1.0)]);
        let metrics = [(METRIC, total / count.max(1) as f64)];
        let metrics = if total > 0.0 { &metrics[..] } else { &[] };
        world.deployment("demo", "default", "kuard", Some("kuard"), count, metrics);
        let names = pods["items"].as_array().unwrap().iter().map(|pod| pod["metadata"]["name"].as_str().unwrap());
        for (container, name) in world.containers_of("default", "kuard").zip(names) {
            container.labels.insert("kubernetes.pod.name".to_owned(), name.to_owned());
        }
        count
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
        assert_eq!(self.plane.json(&["get", "--raw", READ])["items"][0]["value"], "6750m");
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
        let names: Vec<&str> =
            list["resources"].as_array().unwrap().iter().filter_map(|it| it["name"].as_str()).collect();
        assert!(names.contains(&"services/net.http.request.count"), "{names:?}");
        plane.until("the OpenAPI document is merged", || {
            plane.run(&["get", "--raw", "/openapi/v2"]).contains("readSysdigMetric")
        });
        for version in ["v1beta1", "v1beta2"] {
            plane.until(&format!("the OpenAPI document of {version} is passed on"), || {
                let path = format!("/openapi/v3/apis/custom.metrics.k8s.io/{version}");
                plane.kubectl(&["get", "--raw", &path]).status.success()
            });
        }
    }

    /// As the API server would; the adapter itself answers.
    fn aggregator(&self, ca: &Ca) -> Client {
        Client::new(self.port, Some(&ca.issue_client(FRONT_PROXY, &[])))
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

    fn replicas(&self) -> u64 {
        self.plane.json(&["get", "deployment", "kuard", "-o", "json"])["spec"]["replicas"].as_u64().unwrap()
    }

    /// Applies the load until the Deployment has `wanted` replicas, and then for some syncs more.
    fn settle(&self, total: f64, wanted: u64) {
        self.plane.until(&format!("{total} requests/s are {wanted} replicas"), || {
            self.load(total);
            self.replicas() == wanted
        });
        let steady = Instant::now();
        while steady.elapsed() < Duration::from_secs(4) {
            self.load(total);
            assert_eq!(self.replicas(), wanted, "{}", self.describe());
        }
        eprintln!("  {}", self.plane.run(&["get", "hpa", "kuard-autoscaler", "--no-headers"]).trim());
    }

    fn closed_loop(&self, hpa: &str) {
        self.load(0.0);
        assert!(self.plane.apply(hpa).contains("horizontalpodautoscaler.autoscaling/kuard-autoscaler created"));
        self.settle(24.0, 6);
        self.settle(40.0, 10);
        self.settle(0.0, 3);
        self.plane.run(&["delete", "hpa", "kuard-autoscaler"]);
    }

    fn describe(&self) -> String {
        self.plane.run(&["describe", "hpa", "kuard-autoscaler"])
    }

    fn until_described(&self, words: &str) {
        let found = poll(Duration::from_secs(30), || {
            let hpa = self.plane.json(&["get", "hpa", "kuard-autoscaler", "-o", "json"]);
            let conditions = hpa["status"]["conditions"].as_array().cloned().unwrap_or_default();
            conditions.iter().any(|it| it["message"].as_str().is_some_and(|text| text.contains(words))).then_some(())
        });
        assert!(found.is_some(), "{words:?} is not in\n{}", self.describe());
    }

    fn failures(&self, hpa: &str) {
        self.plane.apply(hpa);
        self.settle(24.0, 6);
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
        self.sysdig.set_token("another");
        self.until_described("renew Secret sysdig-api");
        let resources = self.plane.kubectl(&["api-resources"]);
        assert!(resources.status.success() && resources.stderr.is_empty(), "{resources:?}");
        self.namespace_comes_and_goes("while-sysdig-is-down");
        assert_eq!(self.replicas(), 6);
        self.sysdig.set_token(TOKEN);
        self.until_described("the HPA was able to successfully calculate a replica count");
        assert_eq!(self.replicas(), 6);
    }

    fn namespace_comes_and_goes(&self, name: &str) {
        self.plane.run(&["create", "namespace", name]);
        self.plane.run(&["delete", "namespace", name, "--timeout=60s"]);
    }

    fn restart(&mut self) {
        self.adapter = None;
        self.until_described("unable to");
        assert_eq!(self.replicas(), 6);
        self.start_adapter();
        self.until_described("the HPA was able to successfully calculate a replica count");
        assert_eq!(self.replicas(), 6);
        self.plane.run(&["delete", "hpa", "kuard-autoscaler"]);
    }

    fn authorization(&self) {
        let plane = &self.plane;
        let refused = plane.refused(&["get", "--raw", READ, "--as=joe"]);
        assert!(refused.contains("forbidden") && refused.contains("joe"), "{refused}");
        plane.run(&["create", "clusterrolebinding", "joe-reads", "--clusterrole=custom-metrics-getter", "--user=joe"]);
        plane.until("joe may read once he is bound", || {
            plane.kubectl(&["get", "--raw", READ, "--as=joe"]).status.success()
        });
        let team = ["get", "--raw", READ, "--as=josé", "--as-group=Équipe"];
        assert!(plane.refused(&team).contains("josé"));
        plane.run(&["create", "clusterrolebinding", "team", "--clusterrole=custom-metrics-getter", "--group=Équipe"]);
        plane.until("josé may read as one of his group", || plane.kubectl(&team).status.success());
    }

    /// Reads all the time, through the API server, while everything that proves who is who is replaced.
    fn rotations(&mut self) {
        let (ca, admin) = (
            self.plane.ca.pem(),
            self.plane.ca.issue(LeafOptions {
                cn: "admin",
                orgs: &["system:masters"],
                client: true,
                ..LeafOptions::default()
            }),
        );
        let reader = Client::trusting(self.plane.port, &ca, "localhost", Some(&admin));
        let end = AtomicBool::new(false);
        self.load(24.0);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let (mut answered, mut failed) = (0, Vec::new());
                while !end.load(Ordering::Relaxed) {
                    match reader.try_request("GET", READ, &[]) {
                        Ok(response) if response.status == 200 => answered += 1,
                        Ok(response) => failed.push(response.text()),
                        Err(error) => failed.push(error.to_string()),
                    }
                }
                (answered, failed)
            });
            let rotated = panic::catch_unwind(AssertUnwindSafe(|| {
                self.rotate_token();
                self.rotate_front_proxy();
                self.rotate_serving_certificate();
            }));
            end.store(true, Ordering::Relaxed);
            let (answered, failed) = reading.join().unwrap();
            rotated.unwrap_or_else(|cause| panic::resume_unwind(cause));
            assert!(failed.is_empty(), "{} failed beside {answered}: {}", failed.len(), failed[0]);
            eprintln!("  {answered} reads through the API server meanwhile, none failed");
        });
    }

    fn rotate_token(&mut self) {
        self.plane.service_account_dir("custom-metrics", "custom-metrics-apiserver");
        // The API server remembers a good token for ten seconds.
        std::thread::sleep(Duration::from_secs(11));
        let before = self.plane.json(&["get", "--raw", READ]);
        assert_eq!(before["items"][0]["metricName"], METRIC);
    }

    fn rotate_front_proxy(&mut self) {
        let plane = &self.plane;
        let (old, new) = (&plane.front_proxy_ca, Ca::new("next-front-proxy-ca"));
        let published = |what: &str, ca: &str| {
            plane.until(what, || {
                let map = ["get", "configmap", TRUST, "-n", "kube-system", "-o", "json"];
                let map = plane.json(&map);
                map["data"]["requestheader-client-ca-file"].as_str().is_some_and(|it| it.trim() == ca.trim())
            });
        };
        let trusted = |ca: &Ca| self.aggregator(ca).get_as(HPA, &HPA_GROUPS, "/apis").status == 200;
        assert!(trusted(old) && !trusted(&new));
        let both = old.pem() + &new.pem();
        let file = Path::new(plane.dir.path());
        replace(&file.join("front-proxy-ca.crt"), &both);
        published("both front-proxy authorities are published", &both);
        plane.until("both front-proxy authorities are trusted", || trusted(old) && trusted(&new));
        let loaded =
            || plane.log("kube-apiserver").matches(r#""Loaded a new cert/key pair" name="aggregator-proxy"#).count();
        let before = loaded();
        let leaf = new.issue_client(FRONT_PROXY, &[]);
        replace(&file.join("front-proxy.key"), leaf.key_pem());
        replace(&file.join("front-proxy.crt"), leaf.cert_pem());
        plane.until("the API server has its new certificate", || loaded() > before);
        // It does not say when each of its proxies has taken it.
        std::thread::sleep(Duration::from_secs(3));
        replace(&file.join("front-proxy-ca.crt"), new.pem());
        // The API server itself adds to the ConfigMap and takes nothing away.
        let patch = json!({ "data": { "requestheader-client-ca-file": new.pem() } }).to_string();
        plane.run(&["patch", "configmap", TRUST, "-n", "kube-system", "--type=merge", "-p", &patch]);
        published("only the new front-proxy authority is published", &new.pem());
        plane.until("the old front-proxy authority is not trusted any more", || !trusted(old) && trusted(&new));
        self.plane.front_proxy_ca = new;
    }

    /// As if two thirds of its life were over, first of the certificate, then of its authority too.
    fn rotate_serving_certificate(&self) {
        let plane = &self.plane;
        let secret = ["secret", "custom-metrics-apiserver-certificate", "-n", "custom-metrics"];
        for (due, what) in
            [(r#"{"renew":"MQ=="}"#, "certificate"), (r#"{"renew":"MQ==","renew-ca":"MQ=="}"#, "authority")]
        {
            let shown = || Client::new(self.port, None).connect().server_chain();
            let before = shown();
            let patch = format!(r#"{{"data":{due}}}"#);
            plane.run(&[&["patch"], &secret[..], &["--type=merge", "-p", &patch]].concat());
            plane.until(&format!("the adapter serves with a new {what}"), || shown() != before);
        }
    }

    fn quiet_log(&self, since: Instant, from: usize) {
        std::thread::sleep(Duration::from_secs(180).saturating_sub(since.elapsed()));
        let log = self.plane.log("kube-apiserver");
        let about_us = |line: &&str| line.starts_with('E') && line.contains("metrics.k8s.io");
        let errors: Vec<&str> = log[from..].lines().filter(about_us).collect();
        assert!(errors.is_empty(), "{}", errors.join("\n"));
    }

    fn uninstall(&mut self) {
        self.namespace_comes_and_goes("before");
        let slots = ["v1beta1.custom.metrics.k8s.io", "v1beta2.custom.metrics.k8s.io"];
        self.plane.run(&["delete", "apiservice", slots[0], slots[1]]);
        self.namespace_comes_and_goes("without-slots");
        self.adapter = None;
        for name in ["02-sysdig-metrics-server.yml", "01-sysdig-metrics-rbac.yml", "00-kuard.yml"] {
            let file = repository("manifests").join(name).display().to_string();
            self.plane.run(&["delete", "-f", &file, "--ignore-not-found", "--timeout=60s"]);
            self.namespace_comes_and_goes("after-a-file");
        }
        let left = self.plane.json(&["get", "clusterrole,clusterrolebinding", "-o", "json"]);
        let names = left["items"].as_array().unwrap().iter().map(|it| &it["metadata"]["name"]);
        assert_eq!(names.filter(|name| name.as_str().is_some_and(|it| it.contains("custom-metrics"))).count(), 0);
    }
}
