//! Sysdig Monitor: which of its APIs answers a question, and all that both have in common.

use crate::prelude::*;
use crate::tls::{agent, certificates, exchange, explain};
use crate::{api::second_of_day, data, promql, route::percent_decode};
use serde::de::DeserializeOwned;
use std::{cell::Cell, fs, path::PathBuf, sync::atomic::AtomicU64};

pub(crate) const CLUSTER: &str = "kubernetes.cluster.name";
/// Seconds between samples.
pub(crate) const STEP: u64 = 10;
/// Seconds that samples may be ahead of our clock; and that the clocks may differ before it is worth a line in the log.
const AHEAD: u64 = 60;
const MOST_SKEW: u64 = 30;
/// With more objects than this, all of their namespaces are asked for instead of each by its name.
const MOST_NAMES: usize = 500;
/// For how many seconds it stays known that a metric is collected, and that it is not.
const COLLECTED: u64 = 600;
const NOT_COLLECTED: u64 = 60;
const MOST_METRICS: usize = 1000;
// How many queries this thread has sent.
thread_local!(pub(crate) static QUERIES: Cell<u64> = const { Cell::new(0) });
/// How a refusal with [`Reason::BackendInvalidAnswer`] begins.
pub(crate) const UNUSABLE: &str = "Sysdig's answer cannot be used";

/// What is asked of any number of objects at once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// Sysdig's id, a name in PromQL, or a definition's template.
    pub metric: String,
    pub tuning: Tuning,
    /// Of the objects that a row is about.
    pub resource: &'static Resource,
    /// Whether workloads are named by their type and name, as the old adapter did.
    pub legacy: bool,
    /// What samples must have besides.
    pub labels: Vec<Requirement>,
}

impl Question {
    /// Sysdig's labels that tell objects apart, each if there is one: the namespace, and the name.
    pub(crate) fn object_labels(&self) -> [Option<&'static str>; 2] {
        let name = if self.legacy { "kubernetes.workload.name" } else { self.resource.label };
        [self.resource.is_namespaced().then_some(Resource::NAMESPACES.label), Some(name).filter(|it| !it.is_empty())]
    }

    /// What tells these objects in that cluster.
    pub(crate) fn requirements(&self, (namespaces, names): &Scope, cluster: Requirement) -> Vec<Requirement> {
        let [namespace, by] = self.object_labels();
        let workload = BTreeSet::from([self.resource.workload_type.to_owned()]);
        let kind = self.legacy.then_some("kubernetes.workload.type");
        let parts = [(namespace, namespaces), (kind, &workload), (by.filter(|_| names.len() <= MOST_NAMES), names)];
        let parts = parts.into_iter().filter_map(|(label, values)| Some(Requirement::is(label?, values.iter().cloned())));
        iter::once(cluster).chain(parts).collect()
    }
}

/// Namespace (empty where the objects lie in none) and name.
pub type Object = (String, String);

/// Which objects are asked about: their namespaces and their names.
pub type Scope = (BTreeSet<String>, BTreeSet<String>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Unix seconds: up to where there are samples.
    pub end: u64,
    /// The metric; None if no container of the object had a sample of it.
    pub value: Option<Result<Quantity, Reason>>,
    /// Those that Sysdig saw, if the answer tells.
    pub pods: Option<u64>,
    /// Where one object has several series: the labels that tell them apart.
    pub differing: String,
}

pub type Rows = BTreeMap<Object, Row>;

pub struct Sysdig {
    agent: ureq::Agent,
    config: Config,
    /// Seconds by which samples arrive late, as PromQL shows it.
    pub(crate) lag: AtomicU64,
    /// The minute since 1970 of the last query, and how many there were in it.
    pub(crate) queries: Mutex<(u64, u64)>,
    /// Whether a metric is collected in the cluster, and until when that is known.
    collected: Mutex<BTreeMap<String, (bool, u64)>>,
}

impl Sysdig {
    /// Uses the endpoint, token and cluster of `config`. Errors: `SDC_CA_FILE` is wrong.
    pub fn new(config: &Config) -> Result<Self, String> {
        let read = |path: &PathBuf| {
            let found = fs::read(path).map_err(|error| error.to_string()).and_then(certificates);
            found.map_err(|mistake| format!("SDC_CA_FILE {}: {mistake}", path.display()))
        };
        let (roots, config) = (config.sysdig_ca_file.as_ref().map(read).transpose()?, config.clone());
        let agent = agent(roots.as_deref(), !config.insecure_skip_verify, config.sysdig_timeout, ureq::Proxy::try_from_env());
        Ok(Self { agent, config, lag: AtomicU64::new(0), queries: Mutex::default(), collected: Mutex::default() })
    }

    /// Makes sure that a read has its settings. Errors: [`Reason::NotConfigured`], with the command that mends it.
    pub fn check_configured(&self) -> Result<(), Error> {
        self.token().and_then(|_| self.cluster()).map(|_| ())
    }

    /// A template is PromQL whatever is chosen for the rest.
    pub fn speaks_promql(&self, metric: &str) -> bool {
        let auto = self.config.backend == "auto" && !metric.contains('.');
        auto || self.config.backend == "promql" || metric.contains('{')
    }

    /// A row for each object that Sysdig knows. Errors: Sysdig failed, or its answer is not about what was asked.
    pub fn rows(&self, question: &Question, scope: &Scope, now: u64) -> Result<Rows, Error> {
        let ask = if self.speaks_promql(&question.metric) { promql::rows } else { data::rows };
        let rows = ask(self, question, scope, window_end(now))?;
        let ahead = rows.values().map(|row| row.end.saturating_sub(now)).max().unwrap_or_default();
        ensure!(ahead <= AHEAD, BackendInvalidAnswer, "{UNUSABLE}: it is {ahead} s ahead of this node's clock: check NTP");
        let asked = |it: &Object| scope.0.contains(&it.0) && (scope.1.len() > MOST_NAMES || scope.1.contains(&it.1));
        ensure!(rows.keys().all(asked), BackendInvalidAnswer, "{UNUSABLE}: it is about another object than asked for");
        Ok(rows)
    }

    /// Whether anything in the cluster had a sample of the metric within a day; remembered. Errors: Sysdig failed.
    pub fn is_collected(&self, question: &Question, now: u64) -> Result<bool, Error> {
        let known = lock(&self.collected).get(&question.metric).filter(|(_, until)| now < *until).map(|(it, _)| *it);
        let ask = if self.speaks_promql(&question.metric) { promql::is_collected } else { data::is_collected };
        let collected = known.map_or_else(|| ask(self, question, window_end(now)), Ok)?;
        let mut known = lock(&self.collected);
        known.retain(|_, (_, until)| now < *until);
        if known.len() < MOST_METRICS {
            known.entry(question.metric.clone()).or_insert((collected, now + if collected { COLLECTED } else { NOT_COLLECTED }));
        }
        Ok(collected)
    }

    pub fn catalogue(&self) -> Result<Vec<String>, Error> {
        if self.config.backend == "promql" { promql::names(self) } else { data::catalogue(self) }
    }

    fn count_query(&self, now: u64) -> Result<(), Error> {
        let (most, mut queries) = (self.config.max_queries, lock(&self.queries));
        *queries = (now / 60, if queries.0 == now / 60 { queries.1 + 1 } else { 1 });
        if queries.1 > most {
            let used = refusal!(BackendRateLimited, "SDC_MAX_QUERIES_PER_MINUTE ({most}) is used up for this minute");
            return Err(Error { retry_after: Some(60 - now % 60), ..used });
        }
        QUERIES.set(QUERIES.get() + 1);
        Ok(())
    }

    /// The answer to a POST, or to a GET if `body`, which is of type `kind`, is empty.
    pub(crate) fn ask<T: DeserializeOwned>(&self, path: &str, kind: &str, body: String) -> Result<T, Error> {
        let token = self.token()?;
        self.count_query(unix_now())?;
        let api = if path.starts_with("/api/") { "api=\"data\"," } else { "api=\"promql\"," };
        metrics::timed("sysdig_query_duration_seconds", api, || {
            let asked = format!("{path} {body}");
            log::debug!("Sysdig is asked: {}", percent_decode(&asked).as_ref().unwrap_or(&asked));
            let method = if body.is_empty() { Method::GET } else { Method::POST };
            let sent = exchange(&self.agent, method, &format!("{}{path}", self.config.endpoint), &token, [JSON, kind], body);
            let (head, answer) = sent.map_err(|error| self.failed(&error, false))?.into_parts();
            let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
            if let Some(theirs) = header("Date").and_then(second_of_day) {
                let (ours, half) = ((unix_now() % 86_400).cast_signed(), 43_200);
                let skew = (theirs - ours + half).rem_euclid(2 * half) - half;
                let off = || refusal!(BackendInvalidAnswer, "Sysdig's clock is {skew} s ahead of this node's: check NTP");
                let _ = metrics::noted("clock", if skew.unsigned_abs() > MOST_SKEW { Err(off()) } else { Ok(()) });
            }
            if head.status != 200 {
                let retry_after = header("Retry-After").and_then(|text| text.parse().ok());
                return Err(Error { retry_after, ..self.refused(head.status.as_u16(), &answer.unwrap_or_default(), &token) });
            }
            let answer = answer.map_err(|error| self.failed(&error, true))?;
            let shown = String::from_utf8_lossy(answer.get(..4096).unwrap_or(&answer));
            log::debug!("Sysdig answers: {}", shown.replace(token.expose(), "(hidden)"));
            let mistake = |at| refusal!(BackendInvalidAnswer, "{UNUSABLE}: it is not the JSON expected, line and column {at:?}");
            serde_json::from_slice(&answer).map_err(|error| mistake((error.line(), error.column())))
        })
    }

    fn token(&self) -> Result<Secret, Error> {
        let found = match self.config.token_file.as_ref().map(|path| (path.display(), fs::read_to_string(path))) {
            None => self.config.token.clone().ok_or_else(|| "there is no Sysdig API token".to_owned()),
            Some((path, Ok(text))) => Secret::new(text.trim()).ok_or_else(|| format!("{path} holds no API token")),
            Some((path, Err(error))) => Err(format!("the Sysdig API token cannot be read, {path}: {error}")),
        };
        let create = "kubectl create secret generic --from-literal access-key=TOKEN -n custom-metrics sysdig-api";
        let place = "the token is in Sysdig Monitor under Settings, User Profile";
        found.map_err(|why| refusal!(NotConfigured, "{why}: {create} ({place})"))
    }

    pub(crate) fn cluster(&self) -> Result<Requirement, Error> {
        let set = "kubectl set env deployment/custom-metrics-apiserver -n custom-metrics CLUSTER_NAME=NAME";
        let name = "with the cluster's name as Sysdig Monitor shows it";
        let found = self.config.cluster.clone().map(|it| Requirement::is(CLUSTER, [it]));
        found.ok_or_else(|| refusal!(NotConfigured, "CLUSTER_NAME is not set: {set}, {name}"))
    }

    /// Why there is no answer, or none to its end if it has `begun`.
    fn failed(&self, error: &ureq::Error, begun: bool) -> Error {
        let (url, why, check) = (&self.config.endpoint, explain(error), "check SDC_ENDPOINT, SDC_CA_FILE, DNS, egress");
        match error {
            ureq::Error::Timeout(_) => refusal!(BackendTimeout, "Sysdig at {url} did not answer within SDC_TIMEOUT"),
            _ if begun => refusal!(BackendInvalidAnswer, "{UNUSABLE}: it ends early or cannot be read: {why}"),
            ureq::Error::Protocol(_) => refusal!(BackendInvalidAnswer, "{UNUSABLE}: it is not HTTP"),
            _ => refusal!(BackendUnreachable, "Sysdig at {url} cannot be reached: {why} ({check})"),
        }
    }

    fn refused(&self, status: u16, body: &[u8], token: &Secret) -> Error {
        let renew = "does not accept the API token: kubectl create secret generic --from-literal access-key=NEW \
            -n custom-metrics sysdig-api --dry-run=client -o yaml | kubectl apply -f -";
        let (reason, message) = match status {
            401 => (Reason::BackendUnauthorized, renew),
            403 => (Reason::BackendForbidden, "does not let this API token read metrics: check its team and role"),
            429 => (Reason::BackendRateLimited, "limits the rate of this account's queries"),
            400..=499 => (Reason::BackendRejected, "rejects the query"),
            300..=399 => (Reason::BackendRejected, "redirects elsewhere, which is not followed: check SDC_ENDPOINT"),
            _ => (Reason::BackendError, "fails"),
        };
        Error::new(reason, format!("Sysdig {message} ({status}: {})", remark(body, token)))
    }
}

/// The end of the newest window whose samples can all have arrived: the last step is left out.
pub(crate) fn window_end(now: u64) -> u64 {
    now.saturating_sub(STEP) / STEP * STEP
}

/// What a server says about an error, in whichever form, made safe to repeat: should it hold the token, too.
pub(crate) fn remark(body: &[u8], token: &Secret) -> String {
    let text = body.get(..400).unwrap_or(body);
    let value = serde_json::from_slice(body).unwrap_or_else(|_| Value::from(String::from_utf8_lossy(text)));
    let pointers = ["", "/errors/0/message", "/errors/0/reason", "/message", "/error", "/details/0"];
    let found = pointers.iter().find_map(|pointer| Some(value.pointer(pointer)?.as_str()?.to_owned()));
    quoted(&found.unwrap_or_else(|| value.to_string()).replace(token.expose(), "(hidden)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysdig(cluster: &str) -> Sysdig {
        let variables = [("CLUSTER_NAME", cluster), ("SDC_TOKEN", "a-token")];
        let config = Config::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| Ok((*value).to_owned())));
        Sysdig::new(&config.unwrap()).unwrap()
    }

    #[test]
    fn a_window_is_made_of_finished_steps() {
        for (now, end) in [(1000, 990), (1001, 990), (1009, 990), (1010, 1000), (5, 0)] {
            assert_eq!(window_end(now), end, "{now}");
        }
    }

    #[test]
    fn each_kind_of_refusal_has_its_reason_and_hides_the_token() {
        let sysdig = sysdig("blue");
        let token = Secret::new("a-token").unwrap();
        let table = [
            (401, r#"{"timestamp":1,"status":401,"error":"Unauthorized a-token","path":"/"}"#, Reason::BackendUnauthorized),
            (403, r#"{"errors":[{"reason":"r","message":"Access is denied"}]}"#, Reason::BackendForbidden),
            (429, r#"{"type":"t","message":"slow down","details":[]}"#, Reason::BackendRateLimited),
            (400, r#"{"errors":[{"reason":"Metric not found"}]}"#, Reason::BackendRejected),
            (422, "[]", Reason::BackendRejected),
            (302, "", Reason::BackendRejected),
            (500, "<html>", Reason::BackendError),
            (504, "\u{0}\u{1b}", Reason::BackendError),
        ];
        for (status, body, reason) in table {
            let error = sysdig.refused(status, body.as_bytes(), &token);
            assert_eq!(error.reason, reason, "{status}");
            assert!(!error.message.contains("a-token"), "{}", error.message);
            assert!(!error.message.chars().any(char::is_control), "{}", error.message);
        }
    }

    #[test]
    fn what_sysdig_says_is_found_in_all_its_forms() {
        let table = [
            (r#"{"errors":[{"reason":"r","message":"m"}]}"#, "m"),
            (r#"{"errors":[{"reason":"r"}]}"#, "r"),
            (r#"{"message":"m"}"#, "m"),
            (r#"{"status":401,"error":"Unauthorized"}"#, "Unauthorized"),
            (r#"{"details":["d"]}"#, "d"),
            (r#"{"x":1}"#, r#"{"x":1}"#),
            ("Bad gateway", "Bad gateway"),
        ];
        let token = Secret::new("a-token").unwrap();
        for (body, said) in table {
            assert_eq!(remark(body.as_bytes(), &token), quoted(said));
        }
    }
}
