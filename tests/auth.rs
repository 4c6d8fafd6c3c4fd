//! Who is believed to be whom, and who may what: case by case, over real TLS.

mod support;

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use support::http::lock;
use support::{Ca, Client, FRONT_PROXY, HPA, Identity, LeafOptions, METRIC, Response, Setup, Stage};

const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta2";
const READ: &str = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/net.http.request.count";
const REQUEST_HEADER: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// The adapter, with every question that the Kubernetes API was asked about somebody.
struct Court {
    setup: Setup,
    specs: Arc<Mutex<Vec<Value>>>,
}

impl Court {
    /// Everything is allowed that user `denied` does not ask for.
    fn start(stage: Stage) -> Self {
        let specs: Arc<Mutex<Vec<Value>>> = Arc::default();
        let seen = Arc::clone(&specs);
        stage.kubernetes.authorize(move |spec| {
            lock(&seen).push(spec.clone());
            json!({ "allowed": spec["user"] != "denied" })
        });
        let setup = stage.start(binary(), &[]);
        setup.adapter.wait_ready(&setup.client);
        Self { setup, specs }
    }

    /// A client that shows that certificate.
    fn shows(&self, identity: &Identity) -> Client {
        Client::new(self.setup.adapter.port(), Some(identity))
    }

    fn anonymous(&self) -> Client {
        Client::new(self.setup.adapter.port(), None)
    }

    fn bearer(&self, authorization: &str) -> Response {
        self.anonymous().request("GET", READ, &[("Authorization", authorization)])
    }

    /// What was asked last about whoever sent the last request; None if nothing was.
    fn asked(&self) -> Option<Value> {
        self.questions().pop()
    }

    /// All that was asked since somebody looked.
    fn questions(&self) -> Vec<Value> {
        lock(&self.specs).drain(..).collect()
    }
}

fn message(response: &Response) -> String {
    response.json()["message"].as_str().unwrap_or_default().to_owned()
}

fn client_leaf(cn: &str) -> LeafOptions<'_> {
    LeafOptions { cn, client: true, ..LeafOptions::default() }
}

#[test]
fn a_certificate_speaks_for_users_if_it_leads_to_a_trusted_authority_and_has_an_allowed_name() {
    let court = Court::start(Stage::new());
    let (ours, next, rogue) = (&court.setup.front_proxy_ca, Ca::new("next-front-proxy-ca"), Ca::new("front-proxy-ca"));
    let below = ours.intermediate("front-proxy-intermediate");
    let named_below = rogue.intermediate(FRONT_PROXY);
    let lonely = Identity { chain_der: Vec::new(), ..below.issue(client_leaf(FRONT_PROXY)) };
    let foreign_chain = Identity { chain_der: vec![ours.der().clone()], ..rogue.issue(client_leaf(FRONT_PROXY)) };
    let dated = |not_before, not_after| LeafOptions { not_before, not_after, ..client_leaf(FRONT_PROXY) };
    let usage = |client, server| LeafOptions { client, server, ..client_leaf(FRONT_PROXY) };
    let shouted = FRONT_PROXY.to_uppercase();
    let longer = format!("{FRONT_PROXY}-2");
    let leaf = |cn| ours.issue(client_leaf(cn));
    let certificates = [
        ("the right one", leaf(FRONT_PROXY)),
        ("of an intermediate that is brought along", below.issue(client_leaf(FRONT_PROXY))),
        ("of an intermediate that is not brought along", lonely),
        ("of the next authority", next.issue(client_leaf(FRONT_PROXY))),
        ("of an authority of the same name with another key", rogue.issue(client_leaf(FRONT_PROXY))),
        ("of a foreign authority, with ours beside it", foreign_chain),
        ("of a foreign intermediate with the allowed name", named_below.issue(client_leaf("joe"))),
        ("of the cluster's client authority", court.setup.kubernetes.ca().issue(client_leaf(FRONT_PROXY))),
        ("that ended yesterday", ours.issue(dated(-10, -1))),
        ("that begins tomorrow", ours.issue(dated(1, 10))),
        ("for servers only", ours.issue(usage(false, true))),
        ("for servers and clients", ours.issue(usage(true, true))),
        ("for no purpose in particular", ours.issue(usage(false, false))),
        ("with another name", leaf("joe")),
        ("with a longer name", leaf(&longer)),
        ("with the name in capitals", leaf(&shouted)),
        ("with an accent in the name", leaf("front-proxy-clíent")),
        ("with no name", leaf("")),
        ("with the name as an alternative name", ours.issue(LeafOptions { sans: &[FRONT_PROXY], ..client_leaf("joe") })),
        ("with the name as its organization", ours.issue(LeafOptions { orgs: &[FRONT_PROXY], ..client_leaf("joe") })),
        ("with another name that is allowed", leaf("aggregator")),
    ];
    let any_name: &[&str] = &[
        "the right one",
        "of an intermediate that is brought along",
        "of the next authority",
        "for servers and clients",
        "for no purpose in particular",
        "with another name",
        "with a longer name",
        "with the name in capitals",
        "with an accent in the name",
        "with no name",
        "with the name as an alternative name",
        "with the name as its organization",
        "with another name that is allowed",
    ];
    let is_named = |case: &&str| !any_name.contains(case) || !case.starts_with("with ");
    let named: Vec<&str> = any_name.iter().copied().filter(is_named).collect();
    let without = |list: &[&'static str], case: &str| list.iter().copied().filter(|it| *it != case).collect::<Vec<_>>();
    let both = ours.pem() + &next.pem();
    let configurations = [
        (ours.pem(), vec![FRONT_PROXY], without(&named, "of the next authority")),
        (both.clone(), vec!["aggregator", FRONT_PROXY], [&named[..], &["with another name that is allowed"]].concat()),
        (both, vec![], any_name.to_vec()),
        (next.pem(), vec![FRONT_PROXY], vec!["of the next authority"]),
    ];
    for (pem, names, accepted) in configurations {
        court.setup.kubernetes.requestheader(&pem, &names);
        let probe = if accepted.contains(&"the right one") { ours } else { &next };
        let probe = court.shows(&probe.issue(client_leaf(FRONT_PROXY)));
        let other = court.shows(&leaf("aggregator"));
        support::eventually("the new configuration is in force", std::time::Duration::from_secs(30), || {
            let status = |client: &Client| client.request("GET", "/apis", &[("X-Remote-User", HPA)]).status;
            let trusted = accepted.contains(&"with another name that is allowed");
            status(&probe) == 200 && (status(&other) == 200) == trusted
        });
        // Each of those that are not trusted calls for a fresh look at the configuration and waits for it.
        thread::scope(|scope| {
            for (case, identity) in &certificates {
                let (court, accepted, names) = (&court, &accepted, &names);
                scope.spawn(move || {
                    let response = court.shows(identity).request("GET", READ, &[("X-Remote-User", HPA)]);
                    let expected = if accepted.contains(case) { 200 } else { 401 };
                    assert_eq!(response.status, expected, "a certificate {case}, allowed {names:?}: {}", response.text());
                });
            }
        });
    }
}

type Headers = Vec<(&'static str, &'static str)>;

#[test]
fn without_the_configuration_only_health_is_served_and_the_log_names_the_role_binding() {
    let stage = Stage::new();
    stage.kubernetes.forbid(REQUEST_HEADER);
    stage.kubernetes.user("joe-token", "allowed-user", &[]);
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_log("RoleBinding kube-system/custom-metrics-auth-reader");
    let user = [("X-Remote-User", HPA), ("X-Remote-Group", "system:masters")];
    for (path, status) in [("/livez", 200), ("/version", 200), ("/readyz", 503), ("/apis", 401), (READ, 401)] {
        assert_eq!(setup.client.request("GET", path, &user).status, status, "{path}");
    }
    let token = [("Authorization", "Bearer joe-token")];
    assert_eq!(setup.client.request("GET", READ, &token).status, 200, "a token needs no front proxy");
    setup.kubernetes.allow();
    setup.adapter.wait_ready(&setup.client);
    assert_eq!(setup.client.request("GET", READ, &user).status, 200);
}

/// Headers over a verified connection, and who that is to the API server: None is nobody.
fn identities() -> Vec<(Headers, Option<Value>)> {
    let everyone = "system:authenticated";
    vec![
        (vec![("X-Remote-User", "u1")], Some(json!({ "user": "u1", "groups": [everyone] }))),
        (
            vec![("X-Remote-User", "u2"), ("X-Remote-Group", "b"), ("X-Remote-Group", "a")],
            Some(json!({ "user": "u2", "groups": ["b", "a", everyone] })),
        ),
        (
            vec![("X-Remote-User", "u3"), ("X-Remote-Group", everyone), ("X-Remote-Group", "a")],
            Some(json!({ "user": "u3", "groups": [everyone, "a"] })),
        ),
        (
            vec![("x-remote-user", "u4"), ("X-REMOTE-GROUP", "a"), ("x-Remote-groUp", "b")],
            Some(json!({ "user": "u4", "groups": ["a", "b", everyone] })),
        ),
        (vec![("X-Remote-User", "u5"), ("X-Remote-User", "root")], Some(json!({ "user": "u5", "groups": [everyone] }))),
        (vec![("X-Remote-User", ""), ("X-Remote-User", "root")], None),
        (vec![("X-Remote-User", "")], None),
        (vec![("X-Remote-User", " \t ")], None),
        (vec![("X-Remote-Group", "system:masters")], None),
        (vec![("X-Remote-Uid", "1"), ("X-Remote-Group", "a")], None),
        (vec![("X_Remote_User", "root")], None),
        (vec![("X-Remote_User", "root")], None),
        (vec![("XRemoteUser", "root")], None),
        (vec![("X-Remote-Users", "root")], None),
        (
            vec![("X-Remote-User", "u6"), ("X_Remote_Group", "system:masters")],
            Some(json!({ "user": "u6", "groups": [everyone] })),
        ),
        (
            vec![("X-Remote-User", "u7"), ("X-Remote-Group", ""), ("X-Remote-Group", "a")],
            Some(json!({ "user": "u7", "groups": ["a", everyone] })),
        ),
        (
            vec![("X-Remote-User", "u8"), ("X-Remote-Group", "a,b"), ("X-Remote-Group", "c, system:masters")],
            Some(json!({ "user": "u8", "groups": ["a,b", "c, system:masters", everyone] })),
        ),
        (
            vec![("X-Remote-User", "u9"), ("X-Remote-Group", "System:Masters")],
            Some(json!({ "user": "u9", "groups": ["System:Masters", everyone] })),
        ),
        (vec![("X-Remote-User", "system:masters")], Some(json!({ "user": "system:masters", "groups": [everyone] }))),
        (vec![("X-Remote-User", "a%20b+c")], Some(json!({ "user": "a%20b+c", "groups": [everyone] }))),
        (vec![("X-Remote-User", "joe\"}, {")], Some(json!({ "user": "joe\"}, {", "groups": [everyone] }))),
        (
            vec![("X-Remote-User", "u10"), ("X-Remote-Uid", "42"), ("X-Remote-Uid", "0")],
            Some(json!({ "user": "u10", "uid": "42", "groups": [everyone] })),
        ),
        (
            vec![("X-Remote-User", "u11"), ("X-Remote-Extra-Scopes", "a"), ("x-remote-extra-SCOPES", "b")],
            Some(json!({ "user": "u11", "groups": [everyone], "extra": { "scopes": ["a", "b"] } })),
        ),
        (
            vec![("X-Remote-User", "u12"), ("X-Remote-Extra-Authentication.kubernetes.io%2fcredential-Id", "JTI=1")],
            Some(json!({
                "user": "u12", "groups": [everyone], "extra": { "authentication.kubernetes.io/credential-id": ["JTI=1"] },
            })),
        ),
        (
            vec![("X-Remote-User", "u13"), ("X-Remote-Extra-A%zz", "odd"), ("X-Remote-Extra-B", "")],
            Some(json!({ "user": "u13", "groups": [everyone], "extra": { "a%zz": ["odd"], "b": [""] } })),
        ),
        (
            vec![("X-Remote-User", "u14"), ("Authorization", "Bearer other-token")],
            Some(json!({ "user": "u14", "groups": [everyone] })),
        ),
        (
            vec![("X-Remote-User", ""), ("Authorization", "Bearer other-token")],
            Some(json!({ "user": "other", "uid": "uid-of-other", "groups": ["devs", everyone] })),
        ),
        (vec![("X-Remote-User", "u15"), ("Impersonate-User", "root")], Some(json!({ "user": "u15", "groups": [everyone] }))),
    ]
}

#[test]
fn identity_headers_mean_what_they_mean_to_the_api_server() {
    let stage = Stage::new();
    stage.kubernetes.user("other-token", "other", &["devs"]);
    let court = Court::start(stage);
    for (headers, expected) in identities() {
        let response = court.setup.client.request("GET", READ, &headers);
        let spec = court.asked();
        let Some(expected) = expected else {
            assert_eq!((response.status, spec), (401, None), "{headers:?}: {}", response.text());
            continue;
        };
        assert_eq!(response.status, 200, "{headers:?}: {}", response.text());
        let spec = spec.unwrap_or_else(|| panic!("nothing is asked about {headers:?}"));
        for key in ["user", "uid", "groups", "extra"] {
            let found = Some(&spec[key]).filter(|it| !it.is_null() && **it != json!({}));
            assert_eq!(found, expected.get(key), "{key} of {headers:?}");
        }
    }
}

#[test]
fn the_names_of_identity_headers_are_those_of_the_configuration() {
    let stage = Stage::new();
    let list = |values: &[&str]| json!(values).to_string();
    let data = json!({
        "requestheader-client-ca-file": stage.front_proxy_ca.pem(),
        "requestheader-allowed-names": "[]",
        "requestheader-username-headers": list(&["X-First", "X-Second"]),
        "requestheader-group-headers": list(&["X-Group-A", "X-Group-B"]),
        "requestheader-uid-headers": list(&[]),
        "requestheader-extra-headers-prefix": list(&["X-More-", "X-Extra-"]),
    });
    stage.kubernetes.object(REQUEST_HEADER, json!({ "data": data }));
    let court = Court::start(stage);
    let headers = [
        ("X-Second", "second"),
        ("X-First", "first"),
        ("X-Remote-User", "root"),
        ("X-Group-B", "b"),
        ("X-Remote-Group", "system:masters"),
        ("X-Group-A", "a"),
        ("X-Remote-Uid", "0"),
        ("X-Extra-One", "1"),
        ("X-More-Two", "2"),
    ];
    assert_eq!(court.setup.client.request("GET", READ, &headers).status, 200);
    let spec = court.asked().unwrap();
    assert_eq!((&spec["user"], &spec["uid"]), (&json!("first"), &Value::Null));
    assert_eq!(spec["groups"], json!(["a", "b", "system:authenticated"]));
    assert_eq!(spec["extra"], json!({ "one": ["1"], "two": ["2"] }));
    assert_eq!(court.setup.client.request("GET", READ, &headers[..1]).status, 200);
    assert_eq!(court.asked().unwrap()["user"], "second");
    assert_eq!(court.setup.client.request("GET", READ, &[("X-Remote-User", "root")]).status, 401);
}

#[test]
fn a_user_in_ten_thousand_groups_is_asked_about_with_all_of_them() {
    let court = Court::start(Stage::new());
    let groups: Vec<String> = (0..10_000).map(|index| format!("oidc:team-{index}")).collect();
    let mut headers = vec![("X-Remote-User", "manager")];
    headers.extend(groups.iter().map(|group| ("X-Remote-Group", group.as_str())));
    let response = court.setup.client.request("GET", READ, &headers);
    assert_eq!(response.status, 200, "{}", response.text());
    let spec = court.asked().unwrap();
    let asked: Vec<&str> = spec["groups"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(asked.len(), 10_001);
    assert!(asked.iter().zip(&groups).all(|(asked, sent)| asked == sent));
}

/// `Authorization` headers of an unverified connection, and whose they are.
#[test]
fn a_bearer_token_stands_for_whom_the_kubernetes_api_names() {
    let stage = Stage::new();
    let kubernetes = &stage.kubernetes;
    for index in 0..6 {
        kubernetes.user(&format!("token-{index}"), &format!("joe-{index}"), &["devs"]);
    }
    kubernetes.user("nameless", "", &["devs"]);
    kubernetes.user("quo\"ted\\token", "quoted", &[]);
    kubernetes.user("of-a-master", "admin", &["system:masters"]);
    kubernetes.user("denied-token", "denied", &[]);
    let long = "t".repeat(24 * 1024);
    kubernetes.user(&long, "long", &[]);
    let court = Court::start(stage);
    let long = format!("Bearer {long}");
    let table: &[(&str, u16, Option<&str>)] = &[
        ("Bearer token-0", 200, Some("joe-0")),
        ("bearer token-1", 200, Some("joe-1")),
        ("BEARER token-2", 200, Some("joe-2")),
        ("Bearer   token-3", 200, Some("joe-3")),
        ("Bearer token-4   ", 200, Some("joe-4")),
        ("Bearer quo\"ted\\token", 200, Some("quoted")),
        (&long, 200, Some("long")),
        ("Bearer of-a-master", 200, None),
        ("Bearer denied-token", 403, Some("denied")),
        ("Bearer", 401, None),
        ("Bearer ", 401, None),
        ("Bearer\ttoken-5", 401, None),
        ("Bearer token-5,", 401, None),
        ("Bearer token-5 token-5", 401, None),
        ("Bearer Bearer token-5", 401, None),
        ("Bearer TOKEN-5", 401, None),
        ("Bearer unknown", 401, None),
        ("Bearer nameless", 401, None),
        ("Bearer tökén", 401, None),
        ("Bearer token-5%20", 401, None),
        ("Bearer \"token-5\"", 401, None),
        ("Basic dG9rZW4tNTo=", 401, None),
        ("Token token-5", 401, None),
        ("token-5", 401, None),
        ("", 401, None),
    ];
    for (authorization, status, asked) in table {
        let shown: String = authorization.chars().take(60).collect();
        let response = court.bearer(authorization);
        assert_eq!(response.status, *status, "{shown:?}: {}", response.text());
        let spec = court.asked();
        assert_eq!(spec.as_ref().map(|spec| spec["user"].as_str().unwrap()), *asked, "{shown:?}");
        assert!(!response.text().contains("token-5"), "{}", response.text());
    }
    let twice = [("Authorization", "Bearer token-5"), ("Authorization", "Bearer token-5")];
    assert_eq!(court.anonymous().request("GET", READ, &twice).status, 401);
    let rogue = court.shows(&Ca::new("rogue").issue(client_leaf(FRONT_PROXY)));
    assert_eq!(rogue.request("GET", READ, &twice[..1]).status, 200, "a certificate that proves nothing takes nothing");
    let log = court.setup.adapter.log();
    assert!(!log.contains("token-"), "{log}");
}

#[test]
fn a_token_of_a_megabyte_costs_nothing_but_its_answer() {
    let court = Court::start(Stage::new());
    let token = format!("Bearer {}", "t".repeat(1 << 20));
    for _ in 0..20 {
        let mut connection = court.anonymous().connect();
        let _ = connection.try_send_raw(format!("GET {READ} HTTP/1.1\r\nHost: a\r\nAuthorization: {token}\r\n\r\n"));
        // Where the rest of what was sent comes after the end of the connection, it cuts the answer off.
        assert!(connection.try_read_response().map_or(true, |it| it.status == 431));
        let response = court.setup.client.request("GET", READ, &[("X-Remote-User", "u"), ("Authorization", &token)]);
        assert_eq!(response.status, 431, "{}", response.text());
    }
    assert_eq!(court.setup.kubernetes.counter_of("tokenreviews"), 0);
    assert!(court.setup.adapter.rss_kib() < 64 * 1024, "{} KiB", court.setup.adapter.rss_kib());
    assert_eq!(court.setup.read(READ).status, 200);
}

#[test]
fn what_the_kubernetes_api_said_is_remembered_for_each_question_on_its_own() {
    let stage = Stage::new();
    stage.kubernetes.user("joe-token", "joe", &[]);
    stage.kubernetes.user("denied-token", "denied", &[]);
    let court = Court::start(stage);
    let count = |word: &str| court.setup.kubernetes.counter_of(word);
    let before = count("subjectaccessreviews");
    for _ in 0..5 {
        assert_eq!(court.bearer("Bearer joe-token").status, 200);
        assert_eq!(court.bearer("Bearer denied-token").status, 403);
        assert_eq!(court.bearer("Bearer nobody's").status, 401);
    }
    // Who is denied is asked about twice: whether they may everything, and whether they may this.
    assert_eq!((count("tokenreviews"), count("subjectaccessreviews") - before), (3, 3));
    court.setup.kubernetes.authorize(|spec| json!({ "allowed": !is_wide(spec) }));
    let user = ("X-Remote-User", "jane");
    let questions: [Asking<'_>; 7] = [
        (READ, &[user], 2),
        ("/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/services/kuard/net.http.request.count", &[user], 1),
        ("/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/file.iops.total", &[user], 1),
        ("/apis", &[user], 1),
        (READ, &[user, ("X-Remote-Group", "a")], 2),
        (READ, &[user, ("X-Remote-Uid", "7")], 2),
        (READ, &[user, ("X-Remote-Extra-A", "b")], 2),
    ];
    for round in 0..3 {
        for (path, headers, first) in questions {
            let before = count("subjectaccessreviews");
            let status = court.setup.client.request("GET", path, headers).status;
            assert!(status != 401 && status != 403, "{path} {headers:?}: {status}");
            let asked = count("subjectaccessreviews") - before;
            assert_eq!(asked, if round == 0 { first } else { 0 }, "round {round}, {path} {headers:?}");
        }
    }
}

/// A path, headers, and how many questions the first request of its kind leads to.
type Asking<'a> = (&'a str, &'a [(&'a str, &'a str)], usize);

/// Whether a user may read every metric of every object.
fn is_wide(spec: &Value) -> bool {
    spec["resourceAttributes"]["resource"] == "*"
}

fn wide(verb: &str) -> Value {
    json!({ "verb": verb, "group": "custom.metrics.k8s.io", "version": "*", "resource": "*" })
}

#[test]
fn who_may_read_everything_is_asked_about_once_for_any_number_of_objects() {
    let stage = Stage::new();
    for index in 0..20 {
        stage.deployment("default", &format!("app-{index}"), 1, &[(METRIC, 1.0)]);
    }
    let court = Court::start(stage);
    let user = [("X-Remote-User", "manager"), ("X-Remote-Group", "a")];
    for index in 0..20 {
        for (version, object) in [("v1beta1", "services"), ("v1beta2", "deployments.apps")] {
            let path = format!("{BASE}/namespaces/default/{object}/app-{index}/{METRIC}").replace("v1beta2", version);
            let response = court.setup.client.request("GET", &path, &user);
            assert_eq!(response.status, 200, "{path}: {}", response.text());
        }
    }
    let questions = court.questions();
    let [question] = questions.as_slice() else { panic!("{questions:#?}") };
    assert_eq!(question["resourceAttributes"], wide("get"));
    assert_eq!(question["groups"], json!(["a", "system:authenticated"]), "of this user, as of any other");
    assert_eq!(court.setup.client.request("GET", READ, &[("X-Remote-User", "denied")]).status, 403);
    assert_eq!(court.setup.client.request("GET", READ, &[("X-Remote-User", "manager")]).status, 200);
    assert_eq!(court.questions().len(), 3, "whoever else it is, in another group too, is asked about anew");
}

#[test]
fn who_may_not_read_everything_is_asked_about_exactly_what_they_read() {
    let court = Court::start(Stage::new());
    let specs = Arc::clone(&court.specs);
    court.setup.kubernetes.authorize(move |spec| {
        lock(&specs).push(spec.clone());
        json!({ "allowed": spec["resourceAttributes"]["name"] == "kuard" })
    });
    let user = [("X-Remote-User", "joe")];
    let path = |object: &str| format!("{BASE}/namespaces/default/{object}/{METRIC}");
    let table = [("services/kuard", 200, "kuard"), ("services/web", 403, "web"), ("pods/kuard-0", 403, "kuard-0")];
    for (index, (object, status, name)) in table.into_iter().enumerate() {
        let response = court.setup.client.request("GET", &path(object), &user);
        assert_eq!(response.status, status, "{object}: {}", response.text());
        let mut questions = court.questions();
        if index == 0 {
            assert_eq!(questions.remove(0)["resourceAttributes"], wide("get"), "the wide question comes first, and once");
        }
        let [question] = questions.as_slice() else { panic!("{object}: {questions:#?}") };
        let attributes = &question["resourceAttributes"];
        assert_eq!((&attributes["name"], &attributes["namespace"]), (&json!(name), &json!("default")));
        assert_eq!(attributes["version"], "v1beta2");
    }
}

#[test]
fn whether_somebody_may_is_asked_in_the_words_of_the_api_server_and_refused_in_them() {
    let court = Court::start(Stage::new());
    let resource = |resource: &str, subresource: &str, name: &str| {
        json!({ "resourceAttributes": {
            "verb": "get", "group": "custom.metrics.k8s.io", "version": "v1beta2", "namespace": "default",
            "resource": resource, "subresource": subresource, "name": name,
        } })
    };
    let metrics = json!({ "resourceAttributes": {
        "verb": "get", "group": "custom.metrics.k8s.io", "version": "v1beta2", "namespace": "default",
        "resource": "metrics", "subresource": "", "name": METRIC,
    } });
    let path = |path: &str| json!({ "nonResourceAttributes": { "verb": "get", "path": path } });
    let read = |resource: &str, name: &str| {
        format!(
            "{resource}.custom.metrics.k8s.io \"{name}\" is forbidden: User \"denied\" cannot get resource \
             \"{resource}/{METRIC}\" in API group \"custom.metrics.k8s.io\" in the namespace \"default\""
        )
    };
    let at = |path: &str| format!("forbidden: User \"denied\" cannot get path \"{path}\"");
    let objects = [
        ("services/kuard", "services", "kuard"),
        ("pods/kuard-0", "pods", "kuard-0"),
        ("deployments.apps/kuard", "deployments.apps", "kuard"),
        ("deployments/web", "deployments.apps", "web"),
        ("statefulsets.apps/db", "statefulsets.apps", "db"),
        ("daemonsets.apps/logs", "daemonsets.apps", "logs"),
        ("replicasets.apps/kuard-5d9c", "replicasets.apps", "kuard-5d9c"),
        ("jobs.batch/backup", "jobs.batch", "backup"),
        ("services/deployment;kuard", "services", "deployment;kuard"),
        ("services/statefulset%3Bdb", "services", "statefulset;db"),
    ];
    let mut table: Vec<(String, Value, String)> = objects
        .into_iter()
        .map(|(path, plural, name)| {
            let target = format!("{BASE}/namespaces/default/{path}/{METRIC}");
            (target, resource(plural, METRIC, name), read(plural, name))
        })
        .collect();
    let paths = [
        "/",
        "/apis",
        "/apis/custom.metrics.k8s.io",
        "/apis/custom.metrics.k8s.io/v1beta1",
        BASE,
        "/openapi/v2",
        "/openapi/v3",
        "/openapi/v3/apis/custom.metrics.k8s.io/v1beta1",
    ];
    table.extend(paths.map(|it| (it.to_owned(), path(it), at(it))));
    for (target, attributes, refusal) in table {
        let response = court.setup.client.request("GET", &target, &[("X-Remote-User", "denied")]);
        assert_eq!((response.status, message(&response)), (403, refusal), "{target}");
        assert_eq!(response.json()["reason"], "Forbidden");
        let spec = court.asked().unwrap();
        for key in ["resourceAttributes", "nonResourceAttributes"] {
            assert_eq!(spec.get(key), attributes.get(key), "{key} of {target}");
        }
    }
    let target = format!("{BASE}/namespaces/default/metrics/{METRIC}");
    assert_eq!(court.setup.client.request("GET", &target, &[("X-Remote-User", "denied")]).status, 403);
    assert_eq!(court.asked().unwrap()["resourceAttributes"], metrics["resourceAttributes"]);
    assert!(court.setup.sysdig.queries().is_empty(), "nothing is read for who may not");
    for open in ["/healthz", "/livez", "/readyz", "/readyz?verbose", "/version"] {
        assert_eq!(court.setup.client.request("GET", open, &[("X-Remote-User", "denied")]).status, 200, "{open}");
        assert_eq!((court.anonymous().get(open).status, court.asked()), (200, None), "{open}");
    }
    let master = [("X-Remote-User", "denied"), ("X-Remote-Group", "system:masters")];
    assert_eq!(court.setup.client.request("GET", READ, &master).status, 200);
    assert_eq!(court.asked(), None, "masters may everything, whatever the Kubernetes API says");
}
