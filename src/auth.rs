//! Who asks and whether they may: both decided by the Kubernetes API, and remembered for a while.
//! Sources: <https://kubernetes.io/docs/reference/access-authn-authz/authentication/#authenticating-proxy>,
//! <https://kubernetes.io/docs/reference/kubernetes-api/authorization-resources/subject-access-review-v1/>.

use crate::kube::{FULL, Kube, unavailable};
use crate::route::{GROUP, Read, Route};
use crate::{error::Error, error::refusal, handler::Stop, handler::WAIT, lock, tls::sha256};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::{sync::Arc, sync::Mutex, sync::mpsc, time::Duration, time::Instant};
use ureq::http::Method;

const TOKEN: Duration = Duration::from_secs(10);
const ALLOW: Duration = Duration::from_secs(60);
const DENY: Duration = Duration::from_secs(10);
/// An allowance in use that has less than this left is asked for again in the background: no read waits for it.
const AHEAD: Duration = Duration::from_secs(30);
const MOST_REMEMBERED: usize = 10_000;
const REFRESHES: usize = 64;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct User {
    /// `system:serviceaccount:kube-system:horizontal-pod-autoscaler`
    #[serde(rename(serialize = "user", deserialize = "username"))]
    pub(crate) name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) uid: String,
    /// With `system:authenticated`, which everyone has who proved anything.
    pub(crate) groups: Vec<String>,
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

type Digest = [u8; 32];
/// What is known, until when, and whether it is being asked for again.
type Memory<T> = Mutex<HashMap<Digest, (T, Instant, bool)>>;

pub(crate) struct Auth {
    kube: Arc<Kube>,
    tokens: Memory<Option<User>>,
    /// Why a request is denied; None if it is allowed.
    decisions: Memory<Option<String>>,
    refreshes: mpsc::SyncSender<(Digest, Value)>,
}

impl User {
    /// Every authenticated user is also one of this group; the aggregator does not always say so.
    #[must_use]
    pub(crate) fn authenticated(mut self) -> Self {
        let group = "system:authenticated".to_owned();
        if !self.groups.contains(&group) {
            self.groups.push(group);
        }
        self
    }
}

impl Auth {
    pub(crate) fn start(kube: Arc<Kube>) -> Arc<Self> {
        let (refreshes, wanted) = mpsc::sync_channel(REFRESHES);
        let auth = Arc::new(Self { kube, tokens: Mutex::default(), decisions: Mutex::default(), refreshes });
        let refresher = Arc::downgrade(&auth);
        std::thread::spawn(move || {
            while let (Ok((digest, spec)), Some(auth)) = (wanted.recv(), refresher.upgrade()) {
                // Should this fail, the old allowance ends in its time, and the next request asks itself.
                let _ = auth.review(digest, &spec);
            }
        });
        auth
    }

    /// The user whom a bearer token stands for. Errors: 401, or the Kubernetes API cannot tell.
    pub(crate) fn user(&self, token: &str, wait: bool, now: Instant) -> Result<User, Stop> {
        let digest = sha256(token.as_bytes());
        let remembered = lock(&self.tokens).get(&digest).filter(|it| it.1 > now).map(|it| it.0.clone());
        let known = match remembered {
            Some(known) => known,
            None if !wait => return Err(WAIT),
            None => {
                let answer = self.post("authentication", "TokenReview", &json!({ "token": token }))?;
                let authenticated = answer.pointer("/status/authenticated") == Some(&Value::Bool(true));
                let user = answer.pointer("/status/user").filter(|_| authenticated);
                let user = user.and_then(|user| User::deserialize(user).ok()).filter(|user| !user.name.is_empty());
                remember(&self.tokens, digest, user.clone(), now, TOKEN);
                user
            }
        };
        known.map(User::authenticated).ok_or_else(|| unauthenticated().into())
    }

    /// Whether `user` may ask for `route` at `path`.
    /// Errors: 403 in Kubernetes' own words, or the Kubernetes API cannot tell, which is never an allowance.
    pub(crate) fn check(&self, user: &User, route: &Route, path: &str, wait: bool, now: Instant) -> Result<(), Stop> {
        if user.groups.iter().any(|group| group == "system:masters") {
            return Ok(());
        }
        let spec = spec(user, route, path);
        let digest = sha256(spec.to_string().as_bytes());
        let denied = match self.remembered(digest, &spec, now) {
            Some(denied) => denied,
            None if !wait => return Err(WAIT),
            None => self.review(digest, &spec)?,
        };
        denied.map_or(Ok(()), |reason| Err(forbidden(user, route, path, &reason).into()))
    }

    fn remembered(&self, digest: Digest, spec: &Value, now: Instant) -> Option<Option<String>> {
        let mut decisions = lock(&self.decisions);
        let (denied, until, asked_again) = decisions.get_mut(&digest).filter(|it| it.1 > now)?;
        if denied.is_none() && !*asked_again && *until - now < AHEAD {
            *asked_again = self.refreshes.try_send((digest, spec.clone())).is_ok();
        }
        Some(denied.clone())
    }

    fn review(&self, digest: Digest, spec: &Value) -> Result<Option<String>, Error> {
        let answer = self.post("authorization", "SubjectAccessReview", spec)?;
        let silent = || unavailable("it does not say what is allowed");
        let allowed = answer.pointer("/status/allowed").and_then(Value::as_bool).ok_or_else(silent)?;
        let reason = answer.pointer("/status/reason").and_then(Value::as_str).unwrap_or_default();
        let denied = (!allowed).then(|| reason.to_owned());
        remember(&self.decisions, digest, denied.clone(), Instant::now(), if allowed { ALLOW } else { DENY });
        Ok(denied)
    }

    fn post(&self, group: &str, kind: &str, spec: &Value) -> Result<Value, Error> {
        let version = format!("{group}.k8s.io/v1");
        let path = format!("/apis/{version}/{}s", kind.to_ascii_lowercase());
        let review = json!({ "apiVersion": version, "kind": kind, "spec": spec });
        let what = "tokenreviews and subjectaccessreviews (ClusterRoleBinding custom-metrics:system:auth-delegator)";
        self.kube.call(Method::POST, &path, FULL, Some(&review), what)
    }
}

pub(crate) fn unauthenticated() -> Error {
    let mend =
        "ask through the Kubernetes API server (kubectl get --raw /apis/custom.metrics.k8s.io) or with a bearer token";
    refusal!(Unauthenticated, "Unauthorized: {mend}")
}

fn remember<T>(memory: &Memory<T>, digest: Digest, known: T, now: Instant, lifetime: Duration) {
    let mut memory = lock(memory);
    if memory.len() >= MOST_REMEMBERED {
        memory.clear();
    }
    memory.insert(digest, (known, now + lifetime, false));
}

/// The question as the API server itself would put it.
fn spec(user: &User, route: &Route, path: &str) -> Value {
    let mut spec = json!(user);
    let Route::Read(read) = route else {
        spec["nonResourceAttributes"] = json!({ "path": path, "verb": "get" });
        return spec;
    };
    let Read { version, namespace, access: [resource, subresource, name], .. } = &**read;
    spec["resourceAttributes"] = json!({
        "namespace": namespace, "verb": read.verb(), "group": GROUP, "version": version,
        "resource": resource, "subresource": subresource, "name": name,
    });
    spec
}

fn forbidden(user: &User, route: &Route, path: &str, reason: &str) -> Error {
    let who = format!("User {:?} cannot", user.name);
    let filled = |text: &str, shown: String| if text.is_empty() { String::new() } else { shown };
    let why = filled(reason, format!(": {reason}"));
    let Route::Read(read) = route else {
        return refusal!(Forbidden, "forbidden: {who} get path {path:?}{why}");
    };
    let Read { namespace, access: [resource, subresource, name], .. } = &**read;
    let whole = format!("{resource}{}", filled(subresource, format!("/{subresource}")));
    let what = format!("{resource}.{GROUP}{}", filled(name, format!(" {name:?}")));
    let at = if namespace.is_empty() { "at the cluster scope" } else { &format!("in the namespace {namespace:?}") };
    let verb = read.verb();
    refusal!(Forbidden, "{what} is forbidden: {who} {verb} resource {whole:?} in API group {GROUP:?} {at}{why}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::route;

    fn joe() -> User {
        User { name: "joe".to_owned(), groups: vec!["a".to_owned()], ..User::default() }.authenticated()
    }

    #[test]
    fn questions_have_the_attributes_that_the_api_server_would_use() {
        let base = "/apis/custom.metrics.k8s.io/v1beta2";
        let resource = |resource: &str, subresource: Option<&str>, name: &str| {
            let mut expected = json!({
                "namespace": "default", "verb": "get", "group": GROUP, "version": "v1beta2", "resource": resource, "name": name,
                "subresource": subresource.unwrap_or_default(),
            });
            if name.is_empty() {
                expected["verb"] = json!("list");
            }
            ("resourceAttributes", expected)
        };
        let path = |path: &str| ("nonResourceAttributes", json!({ "path": path, "verb": "get" }));
        let table = [
            ("/namespaces/default/services/kuard/m", resource("services", Some("m"), "kuard")),
            ("/namespaces/default/deployments.apps/kuard/m", resource("deployments.apps", Some("m"), "kuard")),
            ("/namespaces/default/services/deployment;kuard/m", resource("services", Some("m"), "deployment;kuard")),
            ("/namespaces/default/metrics/m", resource("metrics", None, "m")),
            ("/namespaces/default/services/%2A/m", resource("services", Some("m"), "*")),
            ("/namespaces/default/m", resource("m", None, "")),
            ("", path(base)),
        ];
        for (rest, (key, expected)) in table {
            let target = format!("{base}{rest}");
            let spec = spec(&joe(), &route("GET", &target).unwrap(), &target);
            assert_eq!(spec[key], expected, "{rest}");
            assert_eq!((&spec["user"], &spec["groups"]), (&json!("joe"), &json!(["a", "system:authenticated"])));
        }
    }

    #[test]
    fn a_refusal_reads_as_kubernetes_own() {
        let target = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/METRIC";
        let read = forbidden(&joe(), &route("GET", target).unwrap(), target, "");
        assert_eq!(
            read.message,
            "services.custom.metrics.k8s.io \"kuard\" is forbidden: User \"joe\" cannot get resource \"services/METRIC\" in \
             API group \"custom.metrics.k8s.io\" in the namespace \"default\""
        );
        let root = forbidden(&joe(), &Route::Version, "/", "no rule");
        assert_eq!(root.message, "forbidden: User \"joe\" cannot get path \"/\": no rule");
    }

    #[test]
    fn an_allowance_in_use_is_asked_for_again_before_it_ends_and_a_denial_is_not() {
        let (refreshes, wanted) = mpsc::sync_channel(REFRESHES);
        let kube = Arc::new(Kube::new(&crate::config::Config::read(|_| None).unwrap()));
        let auth = Auth { kube, tokens: Mutex::default(), decisions: Mutex::default(), refreshes };
        let (now, spec) = (Instant::now(), json!({}));
        let (allowed, denied) = (sha256(b"allowed"), sha256(b"denied"));
        remember(&auth.decisions, allowed, None, now, ALLOW);
        remember(&auth.decisions, denied, Some("no rule".to_owned()), now, DENY);
        let at = |digest, seconds| {
            let found = auth.remembered(digest, &spec, now + Duration::from_secs(seconds));
            (found, wanted.try_iter().map(|(digest, _)| digest).collect::<Vec<_>>())
        };
        let denial = Some(Some("no rule".to_owned()));
        let table = [
            (allowed, 0, (Some(None), vec![])),
            (denied, 0, (denial.clone(), vec![])),
            (denied, 9, (denial, vec![])),
            (denied, 10, (None, vec![])),
            (allowed, 29, (Some(None), vec![])),
            (allowed, 31, (Some(None), vec![allowed])),
            (allowed, 32, (Some(None), vec![])),
            (allowed, 59, (Some(None), vec![])),
            (allowed, 60, (None, vec![])),
        ];
        for (digest, seconds, expected) in table {
            assert_eq!(at(digest, seconds), expected, "after {seconds} s");
        }
    }

    #[test]
    fn everyone_is_authenticated_once() {
        assert_eq!(joe().authenticated(), joe());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let memory = Memory::default();
        let now = Instant::now();
        for n in 0..MOST_REMEMBERED + 10 {
            remember(&memory, sha256(&n.to_be_bytes()), (), now, ALLOW);
        }
        assert!(lock(&memory).len() <= MOST_REMEMBERED);
    }
}
