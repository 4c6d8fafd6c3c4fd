//! Requests as a real kube-apiserver and HPA send them, and what a reference implementation answers.

mod support;

use std::process::Command;

use serde_json::Value;
use support::{HPA, HPA_GROUPS, Setup};

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
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
        _ if path.contains("/nodes/") || path.contains("%2A") || path.contains("metricLabelSelector") => 400,
        _ => 200,
    }
}

#[test]
fn every_captured_request_is_answered() {
    let setup = Setup::start(binary);
    setup.kubernetes.authorize(|_| serde_json::json!({ "allowed": true }));
    for row in rows(include_str!("wire/requests.json")) {
        let path = text(&row, "path");
        let mut head = format!("{} {path} {}\r\n", text(&row, "method"), text(&row, "http_version"));
        for header in row["headers"].as_array().unwrap() {
            head.push_str(&format!("{}: {}\r\n", header[0].as_str().unwrap(), header[1].as_str().unwrap()));
        }
        let mut connection = setup.client.connect();
        connection.send_raw(head + "\r\n");
        let response = connection.read_response();
        assert_eq!(response.status, expected_status(path), "{path}: {}", response.text());
        assert!(response.header("content-type").is_some_and(|it| it.starts_with("application/json")), "{path}");
        let again = connection.get_as(HPA, &HPA_GROUPS, "/apis");
        assert_eq!(again.status, 200, "the connection stays usable after {path}");
    }
}

/// (kind, case) of the reference's rows that are answered with another status here, and why.
const DIFFERENT: &[(&str, &str, u16, &str)] = &[
    ("discovery", "ext", 404, "external metrics are off"),
    ("discovery", "extgroup", 404, "external metrics are off"),
    ("discovery", "metrics", 404, "metrics are no part of the API port"),
    ("read", "pods *", 400, "objects are read by name in this version"),
    ("read", "pods %2A", 400, "objects are read by name in this version"),
    ("read", "dot metric", 200, "the metric exists behind this test"),
    ("read", "metricLabelSelector", 400, "an ignored or unserved selector would be another number"),
    ("read", "ext", 404, "external metrics are off"),
    ("read", "ext sel", 404, "external metrics are off"),
    ("read", "ext sel none", 404, "external metrics are off"),
    ("read", "limit/watch", 400, "a watch is refused instead of answered as a get"),
    ("accept", "application/vnd.kubernetes.protobuf", 406, "JSON only, and no caller needs more"),
    ("accept", "application/yaml", 406, "JSON only, and no caller needs more"),
];

#[test]
fn answers_are_those_of_the_reference_or_better() {
    let setup = Setup::start(binary);
    setup.kubernetes.authorize(|_| serde_json::json!({ "allowed": true }));
    let mut differences = Vec::new();
    for row in rows(include_str!("wire/reference-responses.json")) {
        let (kind, case) = (text(&row, "kind"), text(&row, "case"));
        if kind == "auth" {
            continue;
        }
        let path = text(&row, "path").replace("METRIC", "net.http.request.count");
        let method = if kind == "method" { case } else { "GET" };
        let accept = match kind {
            "accept" => case,
            "aggdisc" => text(&row, "content_type"),
            _ => "*/*",
        };
        let headers = [("X-Remote-User", "admin"), ("X-Remote-Group", "system:masters"), ("Accept", accept)];
        let response = setup.client.request(method, &path, &headers);
        let reference = row["status"].as_u64().unwrap() as u16;
        let expected = DIFFERENT.iter().find(|(k, c, ..)| (*k, *c) == (kind, case)).map_or(reference, |row| row.2);
        if response.status != expected {
            differences.push(format!("{kind} {case} {path}: {} not {expected}: {}", response.status, response.text()));
        }
        if response.status >= 400 && method != "HEAD" {
            assert_eq!(response.json()["kind"], "Status", "{kind} {case}");
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_difference_is_explained_in_the_documentation() {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/conformance.md")).unwrap();
    for (kind, case, status, reason) in DIFFERENT {
        let row = format!("| {kind} | `{case}` | {status} | {reason} |");
        assert!(document.contains(&row), "{row}");
    }
}
