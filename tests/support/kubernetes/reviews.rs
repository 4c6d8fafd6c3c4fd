//! Who somebody is and what they may do: TokenReview and SubjectAccessReview.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::http::Reply;
use super::path::{reason, status};

pub const HPA: &str = "system:serviceaccount:kube-system:horizontal-pod-autoscaler";

const OPEN_PATHS: [&str; 7] = ["/api", "/apis", "/healthz", "/livez", "/openapi", "/readyz", "/version"];

/// Decides a SubjectAccessReview: from its spec to its status.
pub type Authorizer = Box<dyn Fn(&Value) -> Value + Send + Sync>;

/// Answers a SubjectAccessReview.
pub fn access(body: &[u8], decide: &Authorizer) -> Reply {
    let review = match review(body, "authorization.k8s.io/v1", "SubjectAccessReview") {
        Ok(review) => review,
        Err(reply) => return reply,
    };
    let spec = &review["spec"];
    if spec["resourceAttributes"].is_object() == spec["nonResourceAttributes"].is_object() {
        return invalid("exactly one of nonResourceAttributes or resourceAttributes must be specified");
    }
    let has_group = spec["groups"].as_array().is_some_and(|groups| !groups.is_empty());
    if spec["user"].as_str().unwrap_or_default().is_empty() && !has_group {
        return invalid("at least one of user or group must be specified");
    }
    let is_list = |value: &Value| value.as_array().is_some_and(|list| list.iter().all(Value::is_string));
    if !spec["groups"].is_null() && !is_list(&spec["groups"]) {
        return malformed("spec.groups is no list of strings");
    }
    if spec["extra"].as_object().is_some_and(|extra| !extra.values().all(is_list)) {
        return malformed("spec.extra holds something that is no list of strings");
    }
    completed(&review, &decide(spec))
}

/// Answers a SelfSubjectAccessReview: allowed is what lies below none of the `forbidden` paths.
pub fn own(body: &[u8], forbidden: &[String]) -> Reply {
    let review = match review(body, "authorization.k8s.io/v1", "SelfSubjectAccessReview") {
        Ok(review) => review,
        Err(reply) => return reply,
    };
    let attributes = &review["spec"]["resourceAttributes"];
    let text = |key: &str| attributes[key].as_str().unwrap_or_default();
    if text("verb").is_empty() || text("resource").is_empty() || !review["spec"]["user"].is_null() {
        return invalid("verb and resource must be specified, and no user");
    }
    let group = if text("group").is_empty() { "/api".to_owned() } else { format!("/apis/{}", text("group")) };
    let path = format!("{group}/v1/{}", text("resource"));
    let allowed = !forbidden.iter().any(|prefix| path.starts_with(prefix.as_str()));
    completed(&review, &json!({ "allowed": allowed }))
}

/// Answers a TokenReview from the users that tokens belong to.
pub fn token(body: &[u8], users: &BTreeMap<String, Value>) -> Reply {
    let review = match review(body, "authentication.k8s.io/v1", "TokenReview") {
        Ok(review) => review,
        Err(reply) => return reply,
    };
    let Some(token) = review["spec"]["token"].as_str().filter(|token| !token.is_empty()) else {
        return malformed("token is required for TokenReview in authentication");
    };
    let outcome = match users.get(token) {
        Some(user) => json!({
            "authenticated": true, "user": user, "audiences": ["https://kubernetes.default.svc.cluster.local"],
        }),
        None => json!({ "user": {}, "error": "[invalid bearer token, token lookup failed]" }),
    };
    // The API server does not send the token back.
    let mut review = review;
    review["spec"] = json!({});
    completed(&review, &outcome)
}

/// Allows the HPA, `allowed-user`, group system:masters, and discovery for whoever is authenticated.
pub fn default_authorizer() -> Authorizer {
    Box::new(|spec| {
        let groups: Vec<&str> = spec["groups"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let user = spec["user"].as_str().unwrap_or_default();
        let path = spec["nonResourceAttributes"]["path"].as_str();
        let is_open = |path: &str| {
            let below = |open: &str| path.strip_prefix(open).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            OPEN_PATHS.iter().any(|open| below(open))
        };
        let allowed = groups.contains(&"system:masters")
            || path.is_some_and(|path| is_open(path) && groups.contains(&"system:authenticated"))
            || (path.is_none() && [HPA, "allowed-user"].contains(&user));
        if allowed { json!({ "allowed": true, "reason": "RBAC: allowed" }) } else { json!({ "allowed": false }) }
    })
}

fn review(body: &[u8], version: &str, kind: &str) -> Result<Value, Reply> {
    let review: Value = serde_json::from_slice(body).unwrap_or_default();
    if review["apiVersion"] != version || review["kind"] != kind {
        return Err(malformed(&format!("the object provided is no {kind} of {version}")));
    }
    Ok(review)
}

fn completed(review: &Value, outcome: &Value) -> Reply {
    let mut review = review.clone();
    review["metadata"] = json!({ "creationTimestamp": null });
    review["status"] = outcome.clone();
    Reply::json(201, &review)
}

fn malformed(message: &str) -> Reply {
    Reply::json(400, &status(400, reason(400), message))
}

fn invalid(message: &str) -> Reply {
    Reply::json(422, &status(422, "Invalid", &format!("SubjectAccessReview.authorization.k8s.io is invalid: {message}")))
}
