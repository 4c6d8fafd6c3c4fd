//! The walk-through and the failures that users fear, on a real control plane.
//!
//! One test, since starting a control plane takes longer than all that is tried on it. Steps are
//! printed as they pass: `cargo test --test control_plane -- --nocapture`.
#![expect(clippy::print_stderr, reason = "the steps are shown to who runs this by hand")]

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use support::adapter::Adapter;
use support::clock::poll;
use support::control_plane::{ControlPlane, assets, free_port, repository};
use support::sysdig::{Fault, Sysdig};

const METRIC: &str = "net.http.request.count";
const READ: &str = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/services/kuard/net.http.request.count";
const TOKEN: &str = "test-token";

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
            eprintln!("{skipped}");
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
    let by_service = std::fs::read_to_string(repository("manifests/03-kuard-hpa.yml")).unwrap();
    step("an HPA on the Service", || stage.closed_loop(&by_service));
    let described = |kind: &str, version: &str, name: &str| {
        json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": { "name": "kuard-autoscaler", "namespace": "default" },
            "spec": {
                "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "kuard" },
                "minReplicas": 3, "maxReplicas": 10,
                "metrics": [{ "type": "Object", "object": {
                    "describedObject": { "kind": kind, "apiVersion": version, "name": name },
                    "metric": { "name": METRIC }, "target": { "type": "Value", "value": "4" },
                } }],
            },
        })
        .to_string()
    };
    step("an HPA on the legacy name", || stage.closed_loop(&described("Service", "v1", "deployment;kuard")));
    step("an HPA on the Deployment", || stage.closed_loop(&described("Deployment", "apps/v1", "kuard")));
    step("what users fear", || stage.failures(&by_service));
    step("who may read", || stage.authorization());
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
            (Fault::Empty, "none of its containers"),
            (Fault::Status(500), "Sysdig fails"),
            (Fault::Status(429), "Sysdig limits the rate"),
            (Fault::Status(401), "Sysdig does not accept the API token"),
            (Fault::Garbage, "not the JSON expected"),
            (Fault::Truncated, "ends early"),
            (Fault::Hang, "did not answer within SDC_TIMEOUT"),
            (Fault::HangInBody, "did not answer within SDC_TIMEOUT"),
            (Fault::Reset, "cannot be reached"),
            (Fault::Stale(600), "more than MAX_AGE"),
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
