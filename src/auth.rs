//! Who asks and whether they may: both decided by the Kubernetes API, and remembered for a while.
//! Sources: <https://kubernetes.io/docs/reference/access-authn-authz/authentication/#authenticating-proxy>,
//! <https://kubernetes.io/docs/reference/kubernetes-api/authorization-resources/subject-access-review-v1/>.

use crate::prelude::*;
use crate::{handler::Stop, handler::WAIT, kube::unavailable, tls::sha256};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, sync::mpsc};

/// How long an allowance counts, and how long a denial or what a token stands for.
const ALLOWED: Duration = Duration::from_secs(60);
const OTHER: Duration = Duration::from_secs(10);
/// An allowance in use that has less than this left is asked for again in the background: no read waits for it.
const AHEAD: Duration = Duration::from_secs(30);
const MOST_REMEMBERED: usize = 10_000;
const REFRESHES: usize = 64;
const TOKEN_REVIEW: [&str; 2] = ["authentication.k8s.io/v1", "TokenReview"];
const ACCESS_REVIEW: [&str; 2] = ["authorization.k8s.io/v1", "SubjectAccessReview"];

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct User {
    /// `system:serviceaccount:kube-system:horizontal-pod-autoscaler`
    #[serde(rename = "user", alias = "username")]
    pub(crate) name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) uid: String,
    pub(crate) groups: Vec<String>,
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

pub(crate) struct Auth {
    kube: &'static Kube,
    /// The status of each review by its digest, since one may hold a token or be long; until when it counts, and
    /// whether it is being asked for again.
    known: Mutex<HashMap<[u8; 32], (Value, Instant, bool)>>,
    refreshes: mpsc::SyncSender<Value>,
}

impl Auth {
    pub(crate) fn start(kube: &'static Kube) -> &'static Self {
        let (refreshes, wanted) = mpsc::sync_channel(REFRESHES);
        let auth = forever(Self { kube, known: Mutex::default(), refreshes });
        // Should one fail, the old allowance ends in its time, and the next request asks itself.
        thread::spawn(move || wanted.iter().for_each(|review| drop(auth.ask(&review))));
        auth
    }

    /// The user whom a bearer token stands for. Errors: 401, as without one, or the Kubernetes API cannot tell.
    pub(crate) fn user(&self, token: Option<&str>, wait: bool, now: Instant) -> Result<User, Stop> {
        let ask = |token| self.status(TOKEN_REVIEW, &json!({ "token": token }), wait, now);
        let status = token.map(ask).transpose()?.unwrap_or_default();
        let user = User::deserialize(&status["user"]).ok().filter(|it| status["authenticated"] == true && !it.name.is_empty());
        let mend = "ask through the API server (kubectl get --raw /apis/custom.metrics.k8s.io) or with a bearer token";
        user.ok_or_else(|| refusal!(Unauthenticated, "Unauthorized: {mend}").into())
    }

    /// Errors: 403 in Kubernetes' own words, or the Kubernetes API cannot tell, which is never an allowance.
    pub(crate) fn check(&self, mut user: User, route: &Route, path: &str, wait: bool, now: Instant) -> Result<(), Stop> {
        if user.groups.iter().any(|group| group == "system:masters") {
            return Ok(());
        }
        // Every authenticated user is also one of this group; the aggregator does not always say so.
        let everyone = "system:authenticated".to_owned();
        user.groups.extend(Some(everyone).filter(|it| !user.groups.contains(it)));
        let (spec, refused) = question(&user, route, path);
        let known = self.status(ACCESS_REVIEW, &spec, false, now);
        // Who may read everything is asked about once, not for each object: "*" and empty mean all in a review.
        if let (Route::Read(read), Err(_)) = (route, &known) {
            let mut wide = json!(user);
            wide["resourceAttributes"] = json!({ "verb": read.access[0], "group": read.api.0, "version": "*", "resource": "*" });
            if self.status(ACCESS_REVIEW, &wide, wait, now)?["allowed"] == true {
                return Ok(());
            }
        }
        let status = known.or_else(|_| self.status(ACCESS_REVIEW, &spec, wait, now))?;
        let why = status["reason"].as_str().filter(|why| !why.is_empty()).map(|why| format!(": {why}")).unwrap_or_default();
        if status["allowed"] == true { Ok(()) } else { Err(refusal!(Forbidden, "{refused}{why}").into()) }
    }

    /// The status of a review: what is remembered, or what the Kubernetes API says now.
    fn status(&self, review: [&str; 2], spec: &Value, wait: bool, now: Instant) -> Result<Value, Stop> {
        let review = json!({ "apiVersion": review[0], "kind": review[1], "spec": spec });
        let key = sha256(&review.to_string());
        if let Some((status, until, asked_again)) = lock(&self.known).get_mut(&key).filter(|it| it.1 > now) {
            let due = status["allowed"] == true && !*asked_again && *until - now < AHEAD;
            *asked_again |= due && self.refreshes.try_send(review).is_ok();
            return Ok(status.clone());
        }
        if wait { Ok(self.ask(&review)?) } else { Err(WAIT) }
    }

    fn ask(&self, review: &Value) -> Result<Value, Error> {
        let text = |key: &str| review[key].as_str().unwrap_or_default();
        let path = format!("/apis/{}/{}s", text("apiVersion"), text("kind").to_ascii_lowercase());
        let what = "tokenreviews and subjectaccessreviews (ClusterRoleBinding custom-metrics:system:auth-delegator)";
        let status = self.kube.call(Method::POST, &path, JSON, Some(review), what)?.get("status").cloned().unwrap_or_default();
        let told = text("kind") != ACCESS_REVIEW[1] || status["allowed"].is_boolean();
        told.then_some(()).ok_or_else(|| unavailable("it does not say what is allowed"))?;
        self.remember(review, status.clone(), Instant::now());
        Ok(status)
    }

    fn remember(&self, review: &Value, status: Value, now: Instant) {
        let mut known = lock(&self.known);
        if known.len() >= MOST_REMEMBERED {
            known.clear();
        }
        let lifetime = if status["allowed"] == true { ALLOWED } else { OTHER };
        known.insert(sha256(&review.to_string()), (status, now + lifetime, false));
    }
}

/// The question as the API server itself would put it, and its words for a refusal.
fn question(user: &User, route: &Route, path: &str) -> (Value, String) {
    let (mut spec, who) = (json!(user), format!("forbidden: User {:?} cannot", user.name));
    let Route::Read(read) = route else {
        spec["nonResourceAttributes"] = json!({ "path": path, "verb": "get" });
        return (spec, format!("{who} get path {path:?}"));
    };
    let Read { api: (group, version), namespace, access: [verb, resource, subresource, name], .. } = &**read;
    spec["resourceAttributes"] = json!({
        "namespace": namespace, "verb": verb, "group": group, "version": version,
        "resource": resource, "subresource": subresource, "name": name,
    });
    let whole = format!("{resource}/{subresource}");
    let (whole, name) = (whole.trim_end_matches('/'), if name.is_empty() { String::new() } else { format!(" {name:?}") });
    let at = if namespace.is_empty() { "at the cluster scope" } else { &format!("in the namespace {namespace:?}") };
    (spec, format!("{resource}.{group}{name} is {who} {verb} resource {whole:?} in API group {group:?} {at}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::route;

    fn joe() -> User {
        let groups = ["a", "system:authenticated"].map(str::to_owned).to_vec();
        User { name: "joe".to_owned(), groups, ..User::default() }
    }

    fn review(spec: &Value) -> Value {
        json!({ "apiVersion": ACCESS_REVIEW[0], "kind": ACCESS_REVIEW[1], "spec": spec })
    }

    #[test]
    fn questions_have_the_attributes_that_the_api_server_would_use() {
        let base = "/apis/custom.metrics.k8s.io/v1beta2";
        let resource = |resource: &str, subresource: Option<&str>, name: &str| {
            let mut expected = json!({
                "namespace": "default", "verb": "get", "group": "custom.metrics.k8s.io", "version": "v1beta2", "resource": resource, "name": name,
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
            let (spec, _) = question(&joe(), &route("GET", &target, true, &[]).unwrap(), &target);
            assert_eq!(spec[key], expected, "{rest}");
            assert_eq!((&spec["user"], &spec["groups"]), (&json!("joe"), &json!(["a", "system:authenticated"])));
        }
    }

    #[test]
    fn a_refusal_reads_as_kubernetes_own() {
        let (auth, _wanted) = auth();
        let refusal = |route: Route, path: &str, reason: &str| {
            let (spec, now) = (question(&joe(), &route, path).0, Instant::now());
            auth.remember(&review(&spec), json!({ "allowed": false, "reason": reason }), now);
            auth.check(joe(), &route, path, false, now).expect_err(path).expect("a refusal")
        };
        let target = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/METRIC";
        let read = refusal(route("GET", target, true, &[]).unwrap(), target, "");
        assert_eq!(
            read.message,
            "services.custom.metrics.k8s.io \"kuard\" is forbidden: User \"joe\" cannot get resource \"services/METRIC\" in \
             API group \"custom.metrics.k8s.io\" in the namespace \"default\""
        );
        let root = refusal(Route::Document(String::new()), "/", "no rule");
        assert_eq!(
            (root.reason, root.message.as_str()),
            (Reason::Forbidden, "forbidden: User \"joe\" cannot get path \"/\": no rule")
        );
    }

    fn auth() -> (Auth, mpsc::Receiver<Value>) {
        let (refreshes, wanted) = mpsc::sync_channel(REFRESHES);
        let kube = forever(Kube::new(&Config::read(|_| None).unwrap()));
        (Auth { kube, known: Mutex::default(), refreshes }, wanted)
    }

    #[test]
    fn an_allowance_in_use_is_asked_for_again_before_it_ends_and_a_denial_is_not() {
        let (auth, wanted) = auth();
        let (now, allowed, denied) = (Instant::now(), &json!({ "user": "allowed" }), &json!({ "user": "denied" }));
        let (allowance, denial) = (json!({ "allowed": true }), json!({ "allowed": false, "reason": "no rule" }));
        auth.remember(&review(allowed), allowance.clone(), now);
        auth.remember(&review(denied), denial.clone(), now);
        let at = |spec, seconds| {
            let found = auth.status(ACCESS_REVIEW, spec, false, now + Duration::from_secs(seconds));
            (found.ok(), wanted.try_iter().collect::<Vec<_>>())
        };
        let table = [
            (allowed, 0, (Some(allowance.clone()), vec![])),
            (denied, 0, (Some(denial.clone()), vec![])),
            (denied, 9, (Some(denial), vec![])),
            (denied, 10, (None, vec![])),
            (allowed, 29, (Some(allowance.clone()), vec![])),
            (allowed, 31, (Some(allowance.clone()), vec![review(allowed)])),
            (allowed, 32, (Some(allowance.clone()), vec![])),
            (allowed, 59, (Some(allowance), vec![])),
            (allowed, 60, (None, vec![])),
        ];
        for (spec, seconds, expected) in table {
            assert_eq!(at(spec, seconds), expected, "after {seconds} s");
        }
    }

    #[test]
    fn everyone_is_authenticated_once() {
        let ((auth, _wanted), now, route) = (auth(), Instant::now(), Route::Document(String::new()));
        auth.remember(&review(&question(&joe(), &route, "/").0), json!({ "allowed": true }), now);
        for user in [joe(), User { groups: vec!["a".to_owned()], ..joe() }] {
            assert!(auth.check(user, &route, "/", false, now).is_ok());
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (auth, _wanted) = auth();
        for n in 0..MOST_REMEMBERED + 10 {
            auth.remember(&json!(n), json!({ "allowed": true }), Instant::now());
        }
        assert!(lock(&auth.known).len() <= MOST_REMEMBERED);
    }
}
