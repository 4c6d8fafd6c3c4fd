//! Stand-ins of Sysdig and Kubernetes, a client, and the real binary between them.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "every crate that includes this compiles all of it and uses a part"
)]

use std::ops::Deref;
use std::process::Command;

use serde_json::{Value, json};

pub mod adapter;
pub mod client;
pub mod clock;
pub mod control_plane;
pub mod dir;
pub mod http;
pub mod kubernetes;
pub mod pki;
pub mod sysdig;
pub mod wire;

pub use adapter::Adapter;
pub use client::{Client, Connection, Identity, Response};
pub use clock::{eventually, poll, unix_now};
pub use dir::TempDir;
pub use kubernetes::{HPA, Kubernetes};
pub use pki::{Ca, Leaf, LeafOptions};
pub use sysdig::{Series, Sysdig, World};

/// What the walk-through scales on.
pub const METRIC: &str = "net.http.request.count";
/// Where the walk-through reads it.
pub const READ: &str = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/services/kuard/net.http.request.count";
pub const CLUSTER: &str = "demo";
pub const TOKEN: &str = "test-token";
/// The groups of the HPA's user.
pub const HPA_GROUPS: [&str; 3] = ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"];

/// Where the adapter keeps its certificate, as the manifests ship it: empty.
pub const CERTIFICATE_SECRET: &str = "/api/v1/namespaces/custom-metrics/secrets/custom-metrics-apiserver-certificate";

/// The common name of the aggregator's certificate.
pub const FRONT_PROXY: &str = "front-proxy-client";

/// A cluster and a Sysdig account with `kuard` in namespace `default`: 3 pods, 50 requests each.
pub struct Stage {
    pub sysdig: Sysdig,
    pub kubernetes: Kubernetes,
    pub front_proxy_ca: Ca,
    /// Holds the service account's files, and what the adapter puts into its temporary directory.
    pub dir: TempDir,
}

impl Stage {
    pub fn new() -> Self {
        let stage = Self {
            sysdig: Sysdig::start(TOKEN),
            kubernetes: Kubernetes::start(),
            front_proxy_ca: Ca::new("front-proxy-ca"),
            dir: TempDir::new(),
        };
        stage.deployment("default", "kuard", 3, &[(METRIC, 50.0)]);
        stage.kubernetes.requestheader(&stage.front_proxy_ca.pem(), &[FRONT_PROXY]);
        stage.kubernetes.write_service_account(stage.dir.path());
        stage.kubernetes.object(CERTIFICATE_SECRET, json!({ "type": "Opaque" }));
        for version in ["v1beta1", "v1beta2"] {
            stage.kubernetes.object(&api_service(version), slot(version, "api"));
        }
        stage
    }

    /// A Deployment with a Service of the same name, in the cluster and in Sysdig.
    pub fn deployment(&self, namespace: &str, name: &str, replicas: usize, metrics: &[(&str, f64)]) {
        self.kubernetes.deployment(namespace, name, replicas);
        let mut world = self.sysdig.world();
        world.remove_workload(namespace, name);
        world.deployment(CLUSTER, namespace, name, Some(name), replicas, metrics);
    }

    /// What the adapter finds in its environment.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        let dir = self.dir.path().to_str().expect("a temporary directory is UTF-8").to_owned();
        vec![
            ("SDC_ENDPOINT", self.sysdig.url()),
            ("SDC_TOKEN", TOKEN.to_owned()),
            ("CLUSTER_NAME", CLUSTER.to_owned()),
            ("KUBERNETES_SERVICE_HOST", "127.0.0.1".to_owned()),
            ("KUBERNETES_SERVICE_PORT", self.kubernetes.port().to_string()),
            ("SERVICE_ACCOUNT_DIR", dir.clone()),
            ("TMPDIR", dir),
            // Every read asks anew; what is remembered has tests of its own.
            ("REFRESH_INTERVAL", "0s".to_owned()),
        ]
    }

    /// What the aggregator shows.
    pub fn front_proxy(&self) -> Leaf {
        self.front_proxy_ca.issue_client(FRONT_PROXY, &[])
    }

    /// Starts the adapter without waiting until it is ready. An override with an empty value takes a
    /// variable away.
    #[track_caller]
    pub fn start(self, command: Command, overrides: &[(&str, String)]) -> Setup {
        let is_new = |name: &str| overrides.iter().all(|(other, _)| *other != name);
        let mut env: Vec<(&str, String)> = self.env().into_iter().filter(|(name, _)| is_new(name)).collect();
        env.extend(overrides.iter().filter(|(_, value)| !value.is_empty()).cloned());
        let adapter = Adapter::start(command, &env);
        let client = Client::new(adapter.port(), Some(&self.front_proxy()));
        Setup { adapter, client, stage: self }
    }
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

/// A [`Stage`] with the adapter on it. The adapter ends first, then what it talks to.
pub struct Setup {
    pub adapter: Adapter,
    /// Shows the front proxy's certificate.
    pub client: Client,
    stage: Stage,
}

impl Deref for Setup {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        &self.stage
    }
}

impl Setup {
    /// Starts all of it and waits until the adapter is ready.
    #[track_caller]
    pub fn start(command_for: impl Fn() -> Command) -> Self {
        Self::start_with(command_for, &[])
    }

    /// As [`Self::start`], with other environment variables. An empty value takes one away.
    #[track_caller]
    pub fn start_with(command_for: impl Fn() -> Command, overrides: &[(&str, String)]) -> Self {
        let setup = Stage::new().start(command_for(), overrides);
        setup.adapter.wait_ready(&setup.client);
        setup
    }

    /// Asks as the HPA does, through the aggregator.
    pub fn read(&self, path: &str) -> Response {
        self.client.get_as(HPA, &HPA_GROUPS, path)
    }
}

/// The path of our APIService.
pub fn api_service(version: &str) -> String {
    format!("/apis/apiregistration.k8s.io/v1/apiservices/{version}.custom.metrics.k8s.io")
}

/// An APIService that points to a Service in our namespace.
pub fn slot(version: &str, service: &str) -> Value {
    json!({ "spec": {
        "group": "custom.metrics.k8s.io", "version": version, "groupPriorityMinimum": 100, "versionPriority": 100,
        "service": { "name": service, "namespace": "custom-metrics", "port": 443 },
    } })
}
