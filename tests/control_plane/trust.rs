//! Who may read, and what proves who is who, while all of that changes.

use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use super::Stage;
use super::support::dir::replace;
use super::support::{Ca, Client, FRONT_PROXY, HPA, HPA_GROUPS, LeafOptions, METRIC, READ, pki};

/// The ConfigMap that says whose certificate speaks for users.
const TRUST: &str = "extension-apiserver-authentication";
const PODS: &str = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/pods";

impl Stage {
    /// As the API server would; the adapter itself answers.
    pub(crate) fn aggregator(&self, ca: &Ca) -> Client {
        Client::new(self.port, Some(&ca.issue_client(FRONT_PROXY, &[])))
    }

    pub(crate) fn authorization(&self) {
        let plane = &self.plane;
        let refused = plane.refused(&["get", "--raw", READ, "--as=joe"]);
        assert!(refused.contains("forbidden") && refused.contains("joe"), "{refused}");
        plane.run(&["create", "clusterrolebinding", "joe-reads", "--clusterrole=custom-metrics-getter", "--user=joe"]);
        plane.until("joe may read once he is bound", || plane.kubectl(&["get", "--raw", READ, "--as=joe"]).status.success());
        let team = ["get", "--raw", READ, "--as=josé", "--as-group=Équipe"];
        assert!(plane.refused(&team).contains("josé"));
        plane.run(&["create", "clusterrolebinding", "team", "--clusterrole=custom-metrics-getter", "--group=Équipe"]);
        plane.until("josé may read as one of his group", || plane.kubectl(&team).status.success());
    }

    /// Reads all the time, through the API server, while everything that proves who is who is replaced.
    pub(crate) fn rotations(&mut self) {
        let (ca, admin) = (
            self.plane.ca.pem(),
            self.plane.ca.issue(LeafOptions { cn: "admin", orgs: &["system:masters"], client: true, ..LeafOptions::default() }),
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
        let read = self.plane.json(&["get", "--raw", READ]);
        assert_eq!(read["items"][0]["metricName"], METRIC);
        // Nobody has listed these yet, so the API server is asked for them.
        let unknown = format!("{PODS}/%2A/{METRIC}?labelSelector=app%3Dkuard%2C%21token");
        let read = self.plane.json(&["get", "--raw", &unknown]);
        assert_eq!(read["items"].as_array().map(Vec::len), Some(self.replicas() as usize), "{read}");
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
        let loaded = || plane.log("kube-apiserver").matches(r#""Loaded a new cert/key pair" name="aggregator-proxy"#).count();
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
        for (authority, what) in [(false, "certificate"), (true, "authority")] {
            let shown = || Client::new(self.port, None).connect().server_chain();
            let before = shown();
            let found = plane.json(&[&["get"], &secret[..], &["-o", "json"]].concat());
            let patch = json!({ "data": pki::due(&found["data"], authority) }).to_string();
            plane.run(&[&["patch"], &secret[..], &["--type=merge", "-p", &patch]].concat());
            plane.until(&format!("the adapter serves with a new {what}"), || shown() != before);
        }
    }
}
