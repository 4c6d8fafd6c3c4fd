//! Requests as a real kube-apiserver and HPA send them, and what a reference implementation answers.

mod support;

use std::process::Command;

use support::wire::{DIFFERENT, Parties, replay_reference, replay_requests};
use support::{Ca, Client, Setup};

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

#[test]
fn every_captured_request_is_answered() {
    let setup = Setup::start(binary);
    setup.kubernetes.authorize(|_| serde_json::json!({ "allowed": true }));
    assert_eq!(replay_requests(&setup.client), 19);
}

#[test]
fn answers_are_those_of_the_reference_or_better() {
    let setup = Setup::start(binary);
    setup.kubernetes.authorize(|review| {
        let (user, path) = (&review["user"], &review["nonResourceAttributes"]["path"]);
        serde_json::json!({ "allowed": user == "admin" || path.is_string() })
    });
    setup.kubernetes.user("plain-token", "system:serviceaccount:default:plain", &["system:authenticated"]);
    setup.kubernetes.user("admin-token", "admin", &["system:authenticated"]);
    let shows = |ca: &Ca, name: &str| Client::new(setup.adapter.port(), Some(&ca.issue_client(name, &[])));
    let cluster = Ca::new("kubernetes-ca");
    let parties = Parties {
        front_proxy: setup.client.clone(),
        anonymous: Client::new(setup.adapter.port(), None),
        rogue: shows(&Ca::new("rogue"), "front-proxy-client"),
        joe: shows(&cluster, "joe"),
        admin: shows(&cluster, "admin"),
        plain_token: "plain-token".to_owned(),
        admin_token: "admin-token".to_owned(),
    };
    assert_eq!(replay_reference(&setup.client, Some(&parties)), 66);
}

#[test]
fn every_difference_is_explained_in_the_documentation() {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/conformance.md")).unwrap();
    for (kind, case, status, reason) in DIFFERENT {
        let row = format!("| {kind} | `{case}` | {status} | {reason} |");
        assert!(document.contains(&row), "{row}");
    }
}
