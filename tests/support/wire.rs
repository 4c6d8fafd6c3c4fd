//! Captured requests of a real kube-apiserver and HPA, and the cases of a reference implementation.

use serde_json::Value;

use super::client::{Client, Response};
use super::kubernetes::HPA;
use super::{HPA_GROUPS, METRIC};

/// (kind, case) of the reference's rows that are answered with another status here, and why.
pub const DIFFERENT: &[(&str, &str, u16, &str)] = &[
    ("discovery", "ext", 404, "external metrics are off"),
    ("discovery", "extgroup", 404, "external metrics are off"),
    ("read", "dot metric", 200, "the metric exists behind this test"),
    ("read", "list services", 404, "a path of this form is a metric of the namespace, here one that is not known"),
    ("read", "root ns", 200, "metrics of a namespace are served root-scoped, too"),
    ("read", "root ns *", 200, "metrics of namespaces are served root-scoped, too"),
    ("read", "metricLabelSelector", 404, "no container behind this test is named so"),
    ("read", "ext", 404, "external metrics are off"),
    ("read", "ext sel", 404, "external metrics are off"),
    ("read", "ext sel none", 404, "external metrics are off"),
    ("read", "limit/watch", 400, "a watch is refused instead of answered as a get"),
    ("accept", "application/vnd.kubernetes.protobuf", 406, "JSON only, and no caller needs more"),
    ("accept", "application/yaml", 406, "JSON only, and no caller needs more"),
    ("auth", "no cert no headers", 401, "nobody is nobody: there is no anonymous user to ask about"),
    ("auth", "no cert, spoofed headers", 401, "nobody is nobody: there is no anonymous user to ask about"),
    ("auth", "cluster client cert joe", 401, "the cluster's client CA authenticates nobody here"),
    ("auth", "cluster client cert admin", 401, "the cluster's client CA authenticates nobody here"),
    ("auth", "anonymous metrics", 401, "nobody is nobody: there is no anonymous user to ask about"),
    ("auth", "anonymous discovery", 401, "nobody is nobody: there is no anonymous user to ask about"),
];

/// Those who ask in the reference's `auth` rows.
pub struct Parties {
    pub front_proxy: Client,
    pub anonymous: Client,
    /// The right name from an authority that nobody trusts.
    pub rogue: Client,
    /// Certificates of the cluster's own client CA.
    pub joe: Client,
    pub admin: Client,
    /// Tokens of service accounts, one without rights and one with all.
    pub plain_token: String,
    pub admin_token: String,
}

fn rows(text: &str) -> Vec<Value> {
    serde_json::from_str(text).unwrap()
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

/// What is not served yet is refused clearly, and an API server sees no failure in it.
fn expected_status(path: &str) -> u16 {
    match path {
        _ if path.starts_with("/apis/external.metrics.k8s.io") => 404,
        // Labels and nodes that nothing behind these tests has.
        _ if path.contains("/nodes/") || path.contains("tier+in") || path.contains("notin") => 404,
        _ => 200,
    }
}

/// Sends every captured request with the headers it had. Yields their number.
pub fn replay_requests(front_proxy: &Client) -> usize {
    let rows = rows(include_str!("../wire/requests.json"));
    for row in &rows {
        let path = text(row, "path");
        let mut head = format!("{} {path} {}\r\n", text(row, "method"), text(row, "http_version"));
        for header in row["headers"].as_array().unwrap() {
            head.push_str(&format!("{}: {}\r\n", header[0].as_str().unwrap(), header[1].as_str().unwrap()));
        }
        let mut connection = front_proxy.connect();
        connection.send_raw(head + "\r\n");
        let response = connection.read_response();
        assert_eq!(response.status, expected_status(path), "{path}: {}", response.text());
        assert!(response.header("content-type").is_some_and(|it| it.starts_with("application/json")), "{path}");
        let again = connection.get_as(HPA, &HPA_GROUPS, "/apis");
        assert_eq!(again.status, 200, "the connection stays usable after {path}");
    }
    rows.len()
}

/// Asks what the reference was asked, `auth` rows if there is somebody to ask as. Yields their number.
pub fn replay_reference(front_proxy: &Client, parties: Option<&Parties>) -> usize {
    let mut unexpected = Vec::new();
    let mut count = 0;
    for row in rows(include_str!("../wire/reference-responses.json")) {
        let (kind, case) = (text(&row, "kind"), text(&row, "case"));
        let path = text(&row, "path").replace("METRIC", METRIC);
        let method = if kind == "method" { case } else { "GET" };
        let accept = match kind {
            "accept" => case,
            "aggdisc" => text(&row, "content_type"),
            _ => "*/*",
        };
        let response = match (kind, parties) {
            ("auth", None) => continue,
            ("auth", Some(parties)) => parties.ask(case, &path),
            _ => {
                let headers = [("X-Remote-User", "admin"), ("X-Remote-Group", "system:masters"), ("Accept", accept)];
                front_proxy.request(method, &path, &headers)
            }
        };
        let reference = row["status"].as_u64().unwrap() as u16;
        let expected = DIFFERENT.iter().find(|(k, c, ..)| (*k, *c) == (kind, case)).map_or(reference, |row| row.2);
        if response.status != expected {
            unexpected.push(format!("{kind} {case} {path}: {} not {expected}: {}", response.status, response.text()));
        }
        if response.status >= 400 && method != "HEAD" {
            assert_eq!(response.json()["kind"], "Status", "{kind} {case}");
        }
        count += 1;
    }
    assert!(unexpected.is_empty(), "{}", unexpected.join("\n"));
    count
}

impl Parties {
    fn ask(&self, case: &str, path: &str) -> Response {
        let claimed = [("X-Remote-User", "admin"), ("X-Remote-Group", "system:masters")];
        let plain = [("X-Remote-User", "joe"), ("X-Remote-Group", "system:authenticated")];
        let bearer = |token: &str| {
            let value = format!("Bearer {token}");
            self.anonymous.request("GET", path, &[("Authorization", value.as_str())])
        };
        match case {
            "no cert no headers" => self.anonymous.get(path),
            "no cert, spoofed headers" => self.anonymous.request("GET", path, &claimed),
            "rogue CA cert + headers" => self.rogue.request("GET", path, &claimed),
            "cluster client cert joe" => self.joe.get(path),
            "cluster client cert admin" => self.admin.get(path),
            "bearer token of a plain sa" => bearer(&self.plain_token),
            "bearer token of an admin sa" => bearer(&self.admin_token),
            "front-proxy cert, plain user" | "plain user discovery" => self.front_proxy.request("GET", path, &plain),
            case if case.starts_with("anonymous ") => self.anonymous.get(path),
            case => panic!("the auth row {case:?} is new"),
        }
    }
}
