//! Paths of the Kubernetes API, and the Status objects that speak of them.

use serde_json::{Value, json};

pub const SERVICE_ACCOUNT: &str = "system:serviceaccount:custom-metrics:custom-metrics-apiserver";

/// What a path names: an object, or a collection if `name` is None.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiPath {
    /// Empty for the core group.
    pub group: String,
    pub version: String,
    pub namespace: Option<String>,
    pub resource: String,
    pub name: Option<String>,
}

impl ApiPath {
    /// None for paths that name no resource.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return None;
        }
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, resource, name) = match rest {
            [resource] => (None, *resource, None),
            ["namespaces", namespace, resource] => (Some(*namespace), *resource, None),
            [resource, name] => (None, *resource, Some(*name)),
            ["namespaces", namespace, resource, name] => (Some(*namespace), *resource, Some(*name)),
            _ => return None,
        };
        Some(Self {
            group: group.to_owned(),
            version: version.to_owned(),
            namespace: namespace.map(str::to_owned),
            resource: resource.to_owned(),
            name: name.map(str::to_owned),
        })
    }

    /// Whether `self`, a collection, holds the object at `object`. One without a namespace holds those of all.
    pub fn holds(&self, object: &Self) -> bool {
        (&self.group, &self.version, &self.resource) == (&object.group, &object.version, &object.resource)
            && (self.namespace.is_none() || self.namespace == object.namespace)
            && self.name.is_none()
            && object.name.is_some()
    }

    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// The kind of the resource, without a schema to look it up in.
    pub fn kind(&self) -> String {
        let known = [
            ("apiservices", "APIService"),
            ("configmaps", "ConfigMap"),
            ("cronjobs", "CronJob"),
            ("daemonsets", "DaemonSet"),
            ("endpointslices", "EndpointSlice"),
            ("horizontalpodautoscalers", "HorizontalPodAutoscaler"),
            ("ingresses", "Ingress"),
            ("replicasets", "ReplicaSet"),
            ("statefulsets", "StatefulSet"),
        ];
        if let Some((_, kind)) = known.iter().find(|(resource, _)| *resource == self.resource) {
            return (*kind).to_owned();
        }
        let singular = self.resource.strip_suffix('s').unwrap_or(&self.resource);
        singular[..1].to_ascii_uppercase() + &singular[1..]
    }

    /// As in messages: `deployments.apps "kuard"`.
    pub fn quoted(&self) -> String {
        let dot = if self.group.is_empty() { "" } else { "." };
        let name = self.name.as_ref().map_or_else(String::new, |name| format!(" \"{name}\""));
        format!("{}{dot}{}{name}", self.resource, self.group)
    }

    /// What the API server writes when RBAC does not allow a verb.
    pub fn forbidden(&self, verb: &str) -> String {
        // A Namespace counts as lying within itself.
        let own = self.name.as_ref().filter(|_| self.group.is_empty() && self.resource == "namespaces");
        let place = match self.namespace.as_ref().or(own) {
            Some(namespace) => format!("in the namespace \"{namespace}\""),
            None => "at the cluster scope".to_owned(),
        };
        format!(
            "{} is forbidden: User \"{SERVICE_ACCOUNT}\" cannot {verb} resource \"{}\" in API group \"{}\" {place}",
            self.quoted(),
            self.resource,
            self.group
        )
    }
}

/// A failure as the API server words it.
pub fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

/// The reason word that goes with a code.
pub fn reason(code: u16) -> &'static str {
    match code {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "InternalError",
    }
}
