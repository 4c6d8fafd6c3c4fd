//! A real control plane without nodes: etcd, kube-apiserver and kube-controller-manager on loopback.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::clock::poll;
use super::dir::{TempDir, replace};
use super::pki::{Ca, Leaf};

const BINARIES: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"];

/// Where all pods run.
const NODE: &str = "worker-1";

/// The control plane; everything of it ends and is removed with this value.
pub struct ControlPlane {
    children: Vec<(&'static str, Child)>,
    assets: PathBuf,
    pub port: u16,
    pub ca: Ca,
    pub front_proxy_ca: Ca,
    pub dir: TempDir,
    service_account_secret: Option<String>,
}

/// Where the binaries are, or the one line that says how to get them.
pub fn assets() -> Result<PathBuf, String> {
    let folder = std::env::var_os("KUBEBUILDER_ASSETS").map_or_else(|| "/usr/local/kubebuilder/bin".into(), PathBuf::from);
    let missing: Vec<&str> = BINARIES.into_iter().filter(|name| !folder.join(name).is_file()).collect();
    if missing.is_empty() {
        return Ok(folder);
    }
    Err(format!(
        "skipped: the control plane tests need {} in {} (KUBEBUILDER_ASSETS): `setup-envtest use` brings etcd, kube-apiserver \
         and kubectl, https://dl.k8s.io/VERSION/bin/linux/amd64/kube-controller-manager the rest",
        missing.join(", "),
        folder.display()
    ))
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl ControlPlane {
    pub fn start(assets: PathBuf) -> Self {
        let dir = TempDir::new();
        let ca = Ca::new("kubernetes-ca");
        let front_proxy_ca = Ca::new("front-proxy-ca");
        let mut plane =
            Self { children: Vec::new(), assets, port: free_port(), ca, front_proxy_ca, dir, service_account_secret: None };
        plane.write_files();
        plane.start_etcd_and_apiserver();
        let ready = poll(Duration::from_secs(60), || {
            let ready = plane.kubectl(&["get", "--raw", "/readyz"]);
            ready.status.success().then_some(())
        });
        assert!(ready.is_some(), "kube-apiserver is not ready:\n{}", plane.log("kube-apiserver"));
        plane.start_controller_manager();
        plane.until("the default service account", || {
            plane.kubectl(&["get", "serviceaccount", "default", "-n", "default"]).status.success()
        });
        plane.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE } }).to_string());
        plane
    }

    fn write_files(&self) {
        let leaf = |name: &str, leaf: &Leaf| {
            self.dir.write(&format!("{name}.crt"), leaf.cert_pem());
            self.dir.write(&format!("{name}.key"), leaf.key_pem());
        };
        self.dir.write("ca.crt", self.ca.pem());
        self.dir.write("front-proxy-ca.crt", self.front_proxy_ca.pem());
        let sans = ["127.0.0.1", "localhost", "kubernetes.default.svc"];
        leaf("apiserver", &self.ca.issue_server(&sans));
        leaf("admin", &self.ca.issue_client("admin", &["system:masters"]));
        leaf("service-account", &self.ca.issue_client("service-account", &[]));
        leaf("front-proxy", &self.front_proxy_ca.issue_client("front-proxy-client", &[]));
        let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "generateName": "token-" } });
        self.dir.write("token-secret.json", secret.to_string());
        self.write_kubeconfig("admin.conf", "admin");
    }

    fn write_kubeconfig(&self, file: &str, identity: &str) {
        let path = |name: &str| self.file(name);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port),
                "certificate-authority": path("ca.crt"),
            } }],
            "users": [{ "name": identity, "user": {
                "client-certificate": path(&format!("{identity}.crt")),
                "client-key": path(&format!("{identity}.key")),
            } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": identity } }],
        });
        self.dir.write(file, config.to_string());
    }

    fn start_etcd_and_apiserver(&mut self) {
        let (client, peer) = (free_port(), free_port());
        let etcd = [
            format!("--data-dir={}", self.file("etcd")),
            format!("--listen-client-urls=http://127.0.0.1:{client}"),
            format!("--advertise-client-urls=http://127.0.0.1:{client}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
            format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
            "--unsafe-no-fsync=true".to_owned(),
        ];
        self.spawn("etcd", &etcd);
        let apiserver = [
            format!("--etcd-servers=http://127.0.0.1:{client}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={}", self.file("apiserver.crt")),
            format!("--tls-private-key-file={}", self.file("apiserver.key")),
            format!("--client-ca-file={}", self.file("ca.crt")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", self.file("service-account.crt")),
            format!("--service-account-signing-key-file={}", self.file("service-account.key")),
            format!("--requestheader-client-ca-file={}", self.file("front-proxy-ca.crt")),
            "--requestheader-allowed-names=front-proxy-client".to_owned(),
            "--requestheader-username-headers=X-Remote-User".to_owned(),
            "--requestheader-group-headers=X-Remote-Group".to_owned(),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
            format!("--proxy-client-cert-file={}", self.file("front-proxy.crt")),
            format!("--proxy-client-key-file={}", self.file("front-proxy.key")),
            "--endpoint-reconciler-type=none".to_owned(),
            "--allow-privileged=true".to_owned(),
            // Tells of certificates that it loads.
            "--v=2".to_owned(),
        ];
        self.spawn("kube-apiserver", &apiserver);
    }

    fn start_controller_manager(&mut self) {
        let flags = [
            format!("--kubeconfig={}", self.file("admin.conf")),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", free_port()),
            format!("--service-account-private-key-file={}", self.file("service-account.key")),
            format!("--root-ca-file={}", self.file("ca.crt")),
            "--use-service-account-credentials=true".to_owned(),
            "--leader-elect=false".to_owned(),
            // Nothing plays the node's heartbeat.
            "--controllers=*,-node-lifecycle-controller".to_owned(),
            "--horizontal-pod-autoscaler-sync-period=1s".to_owned(),
            "--horizontal-pod-autoscaler-downscale-stabilization=10s".to_owned(),
            "--horizontal-pod-autoscaler-initial-readiness-delay=0s".to_owned(),
        ];
        self.spawn("kube-controller-manager", &flags);
    }

    fn spawn(&mut self, name: &'static str, flags: &[String]) {
        let log = fs::File::create(self.dir.path().join(format!("{name}.log"))).unwrap();
        let child = Command::new(self.assets.join(name))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.children.push((name, child));
    }

    /// The path of a file of this control plane.
    pub fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// What a component has logged so far.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// `kubectl` as a cluster administrator.
    pub fn kubectl(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.assets.join("kubectl"));
        command.args(args).env("KUBECONFIG", self.file("admin.conf")).env("HOME", self.dir.path());
        command.env("KUBECACHEDIR", self.dir.path().join("cache"));
        command
    }

    /// Standard output of a `kubectl` that must succeed.
    pub fn run(&self, args: &[&str]) -> String {
        let output = self.kubectl(args);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "kubectl {}: {stdout}{stderr}", args.join(" "));
        stdout.into_owned()
    }

    /// Standard error of a `kubectl` that must fail.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.kubectl(args);
        assert!(!output.status.success(), "kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.run(args)).unwrap()
    }

    /// `kubectl apply -f -` of an object or a manifest's text.
    pub fn apply(&self, text: &str) -> String {
        let mut child = self.command(&["apply", "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "kubectl apply of {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until `condition` holds; fails after a minute and a half.
    #[expect(clippy::print_stderr, reason = "the steps are shown to who runs this by hand")]
    pub fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let started = Instant::now();
        assert!(poll(Duration::from_secs(90), || condition().then_some(())).is_some(), "{what}: not within 90 s");
        eprintln!("  {what}: after {:.1} s", started.elapsed().as_secs_f64());
    }

    /// Plays the scheduler and the kubelet once for a list of pods: those that are not running yet get a node and become
    /// Running and Ready, those that are to end are gone. Without a node a pod would be behind no Service.
    pub fn run_pods(&self, pods: &Value) {
        for (index, pod) in pods["items"].as_array().unwrap().iter().enumerate() {
            let text = |key: &str| pod["metadata"][key].as_str().unwrap();
            let (namespace, name) = (text("namespace"), text("name"));
            // Each of these may fail: a pod may be deleted meanwhile.
            if pod["metadata"]["deletionTimestamp"].is_string() {
                self.kubectl(&["delete", "pod", name, "-n", namespace, "--grace-period=0", "--force", "--wait=false"]);
                continue;
            }
            if pod["status"]["phase"] == "Running" {
                continue;
            }
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding", "metadata": { "name": name, "namespace": namespace },
                "target": { "apiVersion": "v1", "kind": "Node", "name": NODE },
            });
            let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/binding");
            let file = self.dir.write("binding.json", binding.to_string()).display().to_string();
            self.kubectl(&["create", "--raw", &path, "-f", &file]);
            let unique = name.bytes().fold(index as u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
            let address = format!("10.1.{}.{}", unique >> 8 & 255, unique & 255);
            let status = json!({ "status": {
                "phase": "Running",
                "podIP": address,
                "podIPs": [{ "ip": address }],
                "startTime": "2026-01-01T00:00:00Z",
                "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" }],
            } });
            self.kubectl(&["patch", "pod", name, "-n", namespace, "--subresource=status", "-p", &status.to_string()]);
        }
    }

    /// A service account's token, CA and namespace as they lie in a pod. The token ends what an earlier
    /// call wrote there.
    pub fn service_account_dir(&mut self, namespace: &str, name: &str) -> PathBuf {
        let directory = self.dir.path().join("service-account");
        fs::create_dir_all(&directory).unwrap();
        let (token, secret) = self.token(namespace, name);
        replace(&directory.join("token"), token);
        replace(&directory.join("ca.crt"), self.ca.pem());
        replace(&directory.join("namespace"), namespace);
        if let Some(before) = self.service_account_secret.replace(secret) {
            self.run(&["delete", "secret", &before, "-n", namespace]);
        }
        directory
    }

    /// A token, and the Secret with which it ends.
    pub fn token(&self, namespace: &str, name: &str) -> (String, String) {
        let created = self.json(&["create", "-o", "json", "-f", &self.file("token-secret.json"), "-n", namespace]);
        let secret = created["metadata"]["name"].as_str().unwrap();
        let bound = format!("--bound-object-name={secret}");
        let token = self.run(&["create", "token", name, "-n", namespace, "--bound-object-kind=Secret", &bound]);
        (token.trim().to_owned(), secret.to_owned())
    }
}

/// The files of this repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

impl Drop for ControlPlane {
    #[expect(clippy::print_stderr, reason = "the test harness shows it with the test that failed")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, _) in &self.children {
                let log = self.log(name);
                let tail: Vec<&str> = log.lines().rev().take(15).collect();
                eprintln!("--- the end of {name}'s log\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
            }
        }
        for (_, child) in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
