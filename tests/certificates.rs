//! The serving certificate as the API server sees it, and what proves identity as it changes under load.

mod support;

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use support::client::SERVER_NAME;
use support::dir::replace;
use support::kubernetes::Fault;
use support::{
    Adapter, CERTIFICATE_SECRET, Ca, Client, FRONT_PROXY, HPA, HPA_GROUPS, READ, Setup, Stage, api_service, eventually, slot,
};
use sysdig_metrics_adapter::tls::decode_base64;

const SOON: Duration = Duration::from_secs(45);
/// The adapter looks after its certificate once a minute.
const NEXT_ROUND: Duration = Duration::from_secs(90);

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

fn pem_of(base64: &Value) -> String {
    String::from_utf8(decode_base64(base64.as_str().unwrap_or_default()).unwrap_or_default()).unwrap_or_default()
}

/// What the API server trusts when it connects for that version.
fn bundle(stage: &Stage, version: &str) -> String {
    pem_of(&stage.kubernetes.objects()[&api_service(version)]["spec"]["caBundle"])
}

/// Whether the API server, asking for `name`, would accept who listens there.
fn is_trusted(stage: &Stage, port: u16, version: &str, name: &str) -> bool {
    let pem = bundle(stage, version);
    !pem.is_empty() && Client::trusting(port, &pem, name, None).try_connect().is_ok()
}

#[track_caller]
fn trusted(stage: &Stage, adapter: &Adapter) {
    for version in ["v1beta1", "v1beta2"] {
        eventually("the API server trusts the adapter", SOON, || is_trusted(stage, adapter.port(), version, SERVER_NAME));
    }
}

fn chain(adapter: &Adapter) -> Vec<CertificateDer<'static>> {
    Client::new(adapter.port(), None).connect().server_chain()
}

fn writes(stage: &Stage, word: &str) -> usize {
    let is_write = |request: &&String| request.starts_with("PUT") || request.starts_with("PATCH");
    stage.kubernetes.requests().iter().filter(is_write).filter(|request| request.contains(word)).count()
}

fn silent_about_keys(stage: &Stage, adapter: &Adapter) {
    let log = adapter.log();
    assert!(!log.contains("PRIVATE KEY"), "{log}");
    let data = stage.kubernetes.objects()[CERTIFICATE_SECRET]["data"].clone();
    for key in ["ca.key", "tls.key"].map(|key| pem_of(&data[key])) {
        let line = key.lines().nth(1).unwrap_or("no key");
        assert!(!log.contains(line), "{log}");
    }
}

/// Another replica on the same stage.
fn replica(stage: &Stage) -> Adapter {
    Adapter::start(binary(), &stage.env())
}

#[test]
fn by_default_the_api_server_can_verify_every_name_of_the_service() {
    let setup = Setup::start(binary);
    trusted(&setup, &setup.adapter);
    for version in ["v1beta1", "v1beta2"] {
        for name in ["api.custom-metrics.svc", "api.custom-metrics.svc.cluster.local", "api.custom-metrics", "api", "localhost"] {
            assert!(is_trusted(&setup, setup.adapter.port(), version, name), "{version} {name}");
        }
        for name in ["custom-metrics.svc", "other.custom-metrics.svc", "api.other.svc", "kubernetes.default.svc"] {
            assert!(!is_trusted(&setup, setup.adapter.port(), version, name), "{version} {name}");
        }
        let mut service = setup.kubernetes.objects()[&api_service(version)].clone();
        service["spec"].as_object_mut().unwrap().remove("caBundle");
        assert_eq!(service["spec"], slot(version, "api")["spec"], "nothing but the bundle is written");
    }
    assert_eq!((writes(&setup, "/secrets/"), writes(&setup, "/apiservices/")), (1, 2));
    silent_about_keys(&setup, &setup.adapter);
}

#[test]
fn another_service_name_and_namespace_are_those_of_the_certificate() {
    let stage = Stage::new();
    let secret = CERTIFICATE_SECRET.replace("custom-metrics/secrets", "monitoring/secrets");
    stage.kubernetes.object(&secret, json!({ "type": "Opaque" }));
    for version in ["v1beta1", "v1beta2"] {
        let mut ours = slot(version, "sysdig");
        ours["spec"]["service"]["namespace"] = json!("monitoring");
        stage.kubernetes.object(&api_service(version), ours);
    }
    replace(&stage.dir.path().join("namespace"), "monitoring");
    let setup = stage.start(binary(), &[("SERVICE_NAME", "sysdig".to_owned())]);
    eventually("the API server trusts the adapter", SOON, || {
        is_trusted(&setup, setup.adapter.port(), "v1beta2", "sysdig.monitoring.svc")
    });
    assert!(!is_trusted(&setup, setup.adapter.port(), "v1beta2", SERVER_NAME));
}

#[test]
fn replicas_and_restarts_show_the_same_certificate() {
    let stage = Stage::new();
    let first = replica(&stage);
    trusted(&stage, &first);
    let shown = chain(&first);
    let second = replica(&stage);
    trusted(&stage, &second);
    eventually("the second replica has the certificate of the first", SOON, || chain(&second) == shown);
    drop((first, second));
    let third = replica(&stage);
    trusted(&stage, &third);
    eventually("the third one too", SOON, || chain(&third) == shown);
    assert_eq!((writes(&stage, "/secrets/"), writes(&stage, "/apiservices/")), (1, 2), "written once");
}

#[test]
fn replicas_that_start_at_the_same_moment_agree_on_one_certificate() {
    for _ in 0..5 {
        let stage = Stage::new();
        let replicas = thread::scope(|scope| {
            let starting: Vec<_> = (0..4).map(|_| scope.spawn(|| replica(&stage))).collect();
            starting.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for adapter in &replicas {
            trusted(&stage, adapter);
            eventually("all show the same", SOON, || chain(adapter) == chain(&replicas[0]));
            silent_about_keys(&stage, adapter);
        }
        for version in ["v1beta1", "v1beta2"] {
            assert_eq!(bundle(&stage, version), pem_of(&stage.kubernetes.objects()[CERTIFICATE_SECRET]["data"]["ca.crt"]));
        }
    }
}

#[test]
fn a_damaged_secret_is_made_anew_and_what_was_trusted_stays_trusted() {
    let stage = Stage::new();
    drop({
        let adapter = replica(&stage);
        trusted(&stage, &adapter);
        adapter
    });
    let good = stage.kubernetes.objects()[CERTIFICATE_SECRET]["data"].clone();
    let other = Ca::new("other").issue_server(&[SERVER_NAME]);
    let encoded = |text: String| json!(support::pki::base64(text.as_bytes()));
    let damages: Vec<(&str, Value)> = vec![
        ("data", Value::Null),
        ("ca.crt", json!("!!!")),
        ("ca.crt", encoded("no certificate".to_owned())),
        ("tls.crt", Value::Null),
        ("tls.crt", encoded(other.cert_pem())),
        ("tls.key", encoded(other.key_pem())),
        ("tls.key", encoded(String::new())),
        ("ca.key", encoded("no key".to_owned())),
        ("data", support::pki::due(&good, false)),
        ("data", support::pki::due(&good, true)),
    ];
    for (key, damage) in damages {
        let before = bundle(&stage, "v1beta1");
        let mut data = good.clone();
        *(if key == "data" { &mut data } else { &mut data[key] }) = damage.clone();
        stage.kubernetes.object(CERTIFICATE_SECRET, json!({ "type": "Opaque", "data": data }));
        let adapter = replica(&stage);
        trusted(&stage, &adapter);
        let after = bundle(&stage, "v1beta1");
        let first = before.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap();
        assert!(after.contains(first), "{key} = {damage}: the authority of other replicas stays in the bundle");
        silent_about_keys(&stage, &adapter);
    }
}

#[test]
fn a_slot_of_somebody_else_or_without_verification_is_reported_and_left_alone() {
    let stage = Stage::new();
    let foreign = slot("v1beta1", "prometheus-adapter");
    stage.kubernetes.object(&api_service("v1beta1"), foreign.clone());
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_log("APIService v1beta1.custom.metrics.k8s.io belongs to Service custom-metrics/prometheus-adapter");
    eventually("ours is trusted", SOON, || is_trusted(&setup, setup.adapter.port(), "v1beta2", SERVER_NAME));
    setup.adapter.wait_ready(&setup.client);
    assert_eq!(setup.kubernetes.objects()[&api_service("v1beta1")]["spec"], foreign["spec"]);

    let stage = Stage::new();
    let mut open = slot("v1beta2", "api");
    open["spec"]["insecureSkipTLSVerify"] = json!(true);
    stage.kubernetes.object(&api_service("v1beta2"), open.clone());
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_log("mend: kubectl patch apiservice v1beta2.custom.metrics.k8s.io --type=json");
    setup.adapter.wait_ready(&setup.client);
    assert!(is_trusted(&setup, setup.adapter.port(), "v1beta1", SERVER_NAME));
    assert_eq!(setup.kubernetes.objects()[&api_service("v1beta2")]["spec"], open["spec"]);
}

#[test]
fn a_missing_rule_is_named_and_its_mend_needs_no_restart() {
    for (path, words) in [
        (CERTIFICATE_SECRET, "custom-metrics-apiserver-certificate"),
        ("/apis/apiregistration.k8s.io/v1/apiservices", "APIService v1beta2.custom.metrics.k8s.io"),
    ] {
        let stage = Stage::new();
        stage.kubernetes.forbid(path);
        let setup = stage.start(binary(), &[]);
        setup.adapter.wait_log("serving certificate: kubernetes-forbidden: ");
        let log = setup.adapter.log();
        assert!(log.contains(words), "{log}");
        setup.adapter.wait_ready(&setup.client);
        assert!(!is_trusted(&setup, setup.adapter.port(), "v1beta1", SERVER_NAME));
        setup.kubernetes.allow();
        trusted(&setup, &setup.adapter);
        setup.adapter.wait_log("serving certificate: works again");
    }
}

#[test]
fn a_start_without_the_kubernetes_api_is_healthy_and_gets_ready_when_it_comes() {
    for fault in [Fault::Reset, Fault::Status(500), Fault::Status(401), Fault::Garbage] {
        let stage = Stage::new();
        stage.kubernetes.fail(fault);
        let setup = stage.start(binary(), &[]);
        let anonymous = Client::new(setup.adapter.port(), None);
        assert_eq!(anonymous.get("/livez").status, 200, "{fault:?}");
        let ready = anonymous.get("/readyz?verbose");
        assert_eq!(ready.status, 503, "{fault:?}: {}", ready.text());
        assert!(ready.text().contains("[-]requestheader failed"), "{fault:?}: {}", ready.text());
        assert_eq!(setup.read(READ).status, 401, "{fault:?}: nobody is trusted yet");
        setup.kubernetes.heal();
        trusted(&setup, &setup.adapter);
        setup.adapter.wait_ready(&setup.client);
        assert_eq!(setup.read(READ).status, 200, "{fault:?}");
    }
}

/// Reads over new connections, each trusting what `authority` says at that moment, while `work` goes on.
#[track_caller]
fn under_load(setup: &Setup, authority: impl Fn() -> String + Sync, work: impl FnOnce()) {
    let (end, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let front_proxy = setup.front_proxy();
    let failures: Vec<String> = thread::scope(|scope| {
        let ask = || {
            let mut failures = Vec::new();
            let mut kept = setup.client.connect();
            while !end.load(Ordering::Relaxed) {
                let client = Client::trusting(setup.adapter.port(), &authority(), SERVER_NAME, Some(&front_proxy));
                let mut headers = vec![("X-Remote-User", HPA)];
                headers.extend(HPA_GROUPS.map(|group| ("X-Remote-Group", group)));
                for result in [client.try_request("GET", READ, &headers), kept.try_request("GET", READ, &headers)] {
                    match result {
                        Ok(response) if response.status == 200 => _ = answered.fetch_add(1, Ordering::Relaxed),
                        Ok(response) => failures.push(response.text()),
                        Err(error) => failures.push(error.to_string()),
                    }
                }
                thread::sleep(Duration::from_millis(2));
            }
            failures
        };
        let asking = [scope.spawn(ask), scope.spawn(ask)];
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        end.store(true, Ordering::Relaxed);
        let failures = asking.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        worked.unwrap_or_else(|cause| std::panic::resume_unwind(cause));
        failures
    });
    let answered = answered.load(Ordering::Relaxed);
    assert!(failures.is_empty(), "{} failed beside {answered}: {}", failures.len(), failures[0]);
    assert!(answered > 100, "{answered}");
}

/// Lets the certificate in the Secret be due, its authority too if so wanted, and waits for what comes of it.
fn renew(authority: bool) -> (String, String) {
    let setup = Setup::start(binary);
    trusted(&setup, &setup.adapter);
    let (shown, before) = (chain(&setup.adapter), bundle(&setup, "v1beta1"));
    under_load(
        &setup,
        || bundle(&setup, "v1beta1"),
        || {
            let mut secret = setup.kubernetes.objects()[CERTIFICATE_SECRET].clone();
            secret["data"] = support::pki::due(&secret["data"], authority);
            setup.kubernetes.object(CERTIFICATE_SECRET, secret);
            eventually("a new certificate is served", NEXT_ROUND, || chain(&setup.adapter) != shown);
        },
    );
    silent_about_keys(&setup, &setup.adapter);
    (before, bundle(&setup, "v1beta1"))
}

#[test]
fn a_due_certificate_is_renewed_without_a_failed_request() {
    let (before, after) = renew(false);
    assert_eq!(before, after, "its authority stays");
}

#[test]
fn a_due_authority_is_renewed_beside_the_old_one_without_a_failed_request() {
    let (before, after) = renew(true);
    assert_ne!(before, after);
    assert!(after.contains(&before), "what shows the old certificate still stays trusted");
}

#[test]
fn given_files_are_used_and_followed_and_nothing_is_written_to_the_cluster() {
    let stage = Stage::new();
    let ca = Ca::new("given");
    let write = |dir: &std::path::Path, leaf: &support::Leaf| {
        replace(&dir.join("given.key"), leaf.key_pem());
        replace(&dir.join("given.crt"), leaf.cert_pem());
    };
    let leaf = || ca.intermediate("below").issue_server(&[SERVER_NAME]);
    write(stage.dir.path(), &leaf());
    let file = |name: &str| stage.dir.path().join(name).to_str().unwrap().to_owned();
    let overrides = [("TLS_CERT_FILE", file("given.crt")), ("TLS_KEY_FILE", file("given.key"))];
    let setup = stage.start(binary(), &overrides);
    setup.adapter.wait_ready(&setup.client);
    under_load(
        &setup,
        || ca.pem(),
        || {
            let shown = chain(&setup.adapter);
            assert_eq!(shown.len(), 2, "the intermediate is shown too");
            // A pair that does not fit is not used.
            replace(&setup.dir.path().join("given.key"), leaf().key_pem());
            eventually("the broken pair is reported", SOON, || setup.adapter.log().contains("is not used: "));
            assert_eq!(chain(&setup.adapter), shown);
            write(setup.dir.path(), &leaf());
            eventually("the new pair is used", SOON, || chain(&setup.adapter) != shown);
        },
    );
    assert_eq!(writes(&setup, "/"), 0);
    assert!(!setup.adapter.log().contains("PRIVATE KEY"));
}

#[test]
fn the_front_proxys_authority_and_the_service_accounts_token_rotate_without_a_failed_request() {
    let setup = Setup::start(binary);
    trusted(&setup, &setup.adapter);
    let (old, new) = (&setup.front_proxy_ca, Ca::new("next-front-proxy-ca"));
    let answers = |ca: &Ca| {
        let client = Client::new(setup.adapter.port(), Some(&ca.issue_client(FRONT_PROXY, &[])));
        client.get_as(HPA, &HPA_GROUPS, "/apis").status
    };
    under_load(
        &setup,
        || bundle(&setup, "v1beta1"),
        || {
            for number in 0..5 {
                let token = format!("service-account-token-{number}");
                setup.kubernetes.accept_too(&token);
                replace(&setup.dir.path().join("token"), &token);
                let before = setup.kubernetes.requests().len();
                eventually("the Kubernetes API is asked again", SOON, || setup.kubernetes.requests().len() > before + 5);
                setup.kubernetes.set_token(&token);
            }
            assert_eq!((answers(old), answers(&new)), (200, 401));
            setup.kubernetes.requestheader(&(old.pem() + &new.pem()), &[FRONT_PROXY]);
            eventually("the next authority is trusted", SOON, || answers(&new) == 200);
            assert_eq!(answers(old), 200);
            // What cannot be used leaves what is in force.
            setup.kubernetes.requestheader("no certificate", &[FRONT_PROXY]);
            eventually("the broken one is reported", SOON, || setup.adapter.log().contains("requestheader-client-ca-file holds"));
            assert_eq!((answers(old), answers(&new)), (200, 200));
        },
    );
    setup.kubernetes.requestheader(&new.pem(), &[FRONT_PROXY]);
    eventually("the old authority is not trusted any more", SOON, || answers(old) == 401);
    assert_eq!(answers(&new), 200);
    let mut kept = setup.client.connect();
    assert_eq!(kept.get_as(HPA, &HPA_GROUPS, READ).status, 401, "nor over a connection that is open already");
}
