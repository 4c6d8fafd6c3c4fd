//! Sysdig Monitor: which of its APIs answers a question, and all that both have in common.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;
use ureq::http::{Method, Request};
use ureq::{Agent, Proxy};

use crate::config::{Config, Secret, TokenSource};
use crate::error::{Error, Reason, quoted, refusal};
use crate::quantity::Quantity;
use crate::selector::{Requirement, Tuning};
use crate::tls::{agent, certificates, explain};
use crate::{data, promql};

/// Seconds between samples.
const STEP: u64 = 10;
/// Seconds that Sysdig's clock may be ahead of ours.
const AHEAD: u64 = 60;
const LARGEST_ANSWER: u64 = 8 * 1024 * 1024;
pub(crate) const JSON: &str = "application/json";

/// What is asked: one metric of all objects that a label tells apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question<'a> {
    pub metric: &'a str,
    pub tuning: Tuning,
    /// Whether it is about nodes, not containers.
    pub host: bool,
    /// Sysdig's label that names the objects; None for one object that `scope` makes up.
    pub by: Option<&'static str>,
    /// Where the objects are. The cluster is added by the backend.
    pub scope: Vec<Requirement>,
    /// What samples must have besides.
    pub labels: &'a [Requirement],
}

impl Question<'_> {
    pub(crate) fn requirements(&self) -> Vec<Requirement> {
        [self.scope.as_slice(), self.labels].concat()
    }

    /// About these objects only.
    pub(crate) fn about(mut self, names: &[String]) -> Self {
        if let Some(label) = self.by {
            self.scope.retain(|it| it.key != label);
            self.scope.push(Requirement { key: label.to_owned(), values: names.to_vec() });
        }
        self
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub object: String,
    /// Unix seconds: up to where there are samples.
    pub end: u64,
    /// The metric; None if no container of the object had a sample of it.
    pub value: Option<Result<Quantity, Reason>>,
    /// Those that Sysdig saw, if the answer tells.
    pub pods: Option<u64>,
}

pub struct Sysdig {
    agent: Agent,
    pub(crate) endpoint: String,
    token: TokenSource,
    cluster: Option<String>,
    promql: Option<bool>,
}

impl Sysdig {
    /// Uses the endpoint, token and cluster of `config`. Errors: `SDC_CA_FILE` or a proxy variable is wrong.
    pub fn new(config: &Config) -> Result<Self, String> {
        let read = |path: &PathBuf| {
            let pem = std::fs::read(path).map_err(|error| error.to_string());
            let found = pem.and_then(|pem| certificates(&pem));
            found.map_err(|mistake| format!("SDC_CA_FILE {}: {mistake}", path.display()))
        };
        let roots = config.sysdig_ca_file.as_ref().map(read).transpose()?;
        Ok(Self {
            agent: agent(roots.as_deref(), config.sysdig_timeout, Proxy::try_from_env()),
            endpoint: config.endpoint.clone(),
            token: config.token.clone(),
            cluster: config.cluster.clone(),
            promql: config.promql,
        })
    }

    /// Makes sure that a read has its settings. Errors: [`Reason::NotConfigured`], with the command that mends it.
    pub fn check_configured(&self) -> Result<(), Error> {
        self.token()?;
        self.cluster().map(|_| ())
    }

    pub fn speaks_promql(&self, metric: &str) -> bool {
        self.promql.unwrap_or_else(|| !metric.contains('.'))
    }

    /// What Sysdig has for the objects at `now`, one row for each it knows.
    /// Errors: Sysdig failed, or its answer is not about what was asked.
    pub fn rows(&self, question: &Question<'_>, now: u64) -> Result<Vec<Row>, Error> {
        let end = window_end(now);
        let promql = self.speaks_promql(question.metric);
        let rows = if promql { promql::rows(self, question, end) } else { data::rows(self, question, end) }?;
        let ahead = rows.iter().map(|row| row.end).max().unwrap_or_default().saturating_sub(now);
        if ahead > AHEAD {
            return Err(invalid_answer(&format!("it is {ahead} s ahead of this node's clock: check the node's time")));
        }
        Ok(rows)
    }

    /// How many pods Sysdig saw in the window of a question about one object. Errors: Sysdig failed.
    pub fn pods(&self, question: &Question<'_>, now: u64) -> Result<u64, Error> {
        data::pods(self, question, window_end(now))
    }

    /// Whether anything in the cluster had a sample of the metric within a day. Errors: Sysdig failed.
    pub fn is_collected(&self, question: &Question<'_>, now: u64) -> Result<bool, Error> {
        match self.speaks_promql(question.metric) {
            true => promql::is_collected(self, question, window_end(now)),
            false => data::is_collected(self, question, window_end(now)),
        }
    }

    pub fn catalogue(&self) -> Result<Vec<String>, Error> {
        let mut ids = if self.promql == Some(true) { promql::names(self)? } else { data::catalogue(self)? };
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The answer to a GET, or with a body of some type to a POST.
    pub(crate) fn ask<T: for<'de> Deserialize<'de>>(
        &self,
        path: &str,
        body: Option<(&str, String)>,
    ) -> Result<T, Error> {
        let token = self.token()?;
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let (content_type, body) = body.unwrap_or((JSON, String::new()));
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.endpoint))
            .header("Authorization", format!("Bearer {}", token.expose()))
            .header("Accept", JSON)
            .header("Content-Type", content_type)
            .body(body);
        let sent = request.map_err(ureq::Error::from).and_then(|request| self.agent.run(request));
        let mut response = sent.map_err(|error| self.unreachable(&error))?;
        let status = response.status().as_u16();
        let retry_after = response.headers().get("Retry-After").and_then(|value| value.to_str().ok()?.parse().ok());
        let body = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        if status != 200 {
            return Err(self.refused(status, &body.unwrap_or_default(), &token).retry_after(retry_after));
        }
        let body = body.map_err(|error| match error {
            ureq::Error::Timeout(_) => self.unreachable(&error),
            other => invalid_answer(&format!("it ends early or cannot be read: {}", explain(&other))),
        })?;
        let place = |error: serde_json::Error| format!("line {}, column {}", error.line(), error.column());
        serde_json::from_slice(&body)
            .map_err(|error| invalid_answer(&format!("it is not the JSON expected ({})", place(error))))
    }

    fn token(&self) -> Result<Secret, Error> {
        let found = match &self.token {
            TokenSource::Given(token) => Ok(token.clone()),
            TokenSource::Missing => Err("there is no Sysdig API token".to_owned()),
            TokenSource::File(path) => match std::fs::read_to_string(path) {
                Ok(text) => Secret::new(text.trim()).ok_or_else(|| format!("{} holds no API token", path.display())),
                Err(error) => Err(format!("the Sysdig API token cannot be read, {}: {error}", path.display())),
            },
        };
        found.map_err(|why| {
            refusal!(
                NotConfigured,
                "{why}: kubectl create secret generic --from-literal access-key=TOKEN -n custom-metrics sysdig-api \
                 (the token is in Sysdig Monitor under Settings, User Profile)"
            )
        })
    }

    pub(crate) fn cluster(&self) -> Result<&str, Error> {
        self.cluster.as_deref().ok_or_else(|| {
            refusal!(
                NotConfigured,
                "CLUSTER_NAME is not set: kubectl set env deployment/custom-metrics-apiserver -n custom-metrics \
                 CLUSTER_NAME=NAME, with the cluster's name as Sysdig Monitor shows it"
            )
        })
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        let (host, why) = (&self.endpoint, explain(error));
        match error {
            ureq::Error::Timeout(_) => refusal!(BackendTimeout, "Sysdig at {host} did not answer within SDC_TIMEOUT"),
            ureq::Error::Protocol(_) => invalid_answer("it is not HTTP"),
            _ => refusal!(
                BackendUnreachable,
                "Sysdig at {host} cannot be reached: {why} (check SDC_ENDPOINT, DNS and egress)"
            ),
        }
    }

    fn refused(&self, status: u16, body: &[u8], token: &Secret) -> Error {
        let remark = remark(body).replace(token.expose(), "(hidden)");
        let says = format!("({status}: {})", quoted(&remark));
        let (reason, message) = match status {
            401 => (
                Reason::BackendUnauthorized,
                "does not accept the API token: renew Secret sysdig-api, the token may have expired",
            ),
            403 => (Reason::BackendForbidden, "does not let this API token read metrics: check its team and role"),
            429 => (Reason::BackendRateLimited, "limits the rate of this account's queries"),
            400..=499 => (Reason::BackendRejected, "rejects the query"),
            300..=399 => (Reason::BackendRejected, "redirects elsewhere, which is not followed: check SDC_ENDPOINT"),
            _ => (Reason::BackendError, "fails"),
        };
        Error::new(reason, format!("Sysdig {message} {says}"))
    }
}

/// The end of the newest window whose samples can all have arrived: the last step is left out.
fn window_end(now: u64) -> u64 {
    now.saturating_sub(STEP) / STEP * STEP
}

pub(crate) fn invalid_answer(why: &str) -> Error {
    refusal!(BackendInvalidAnswer, "Sysdig's answer cannot be used: {why}")
}

/// What a server says about an error, in whichever form.
pub(crate) fn remark(body: &[u8]) -> String {
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        return String::from_utf8_lossy(body.get(..400).unwrap_or(body)).into_owned();
    };
    let pointers = ["/errors/0/message", "/errors/0/reason", "/message", "/error", "/details/0"];
    let found = pointers.iter().find_map(|pointer| value.pointer(pointer).and_then(Value::as_str));
    found.map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysdig(cluster: &str) -> Sysdig {
        let variables = [("CLUSTER_NAME", cluster), ("SDC_TOKEN", "a-token")];
        let config =
            Config::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| Ok((*value).to_owned())));
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
            (
                401,
                r#"{"timestamp":1,"status":401,"error":"Unauthorized a-token","path":"/"}"#,
                Reason::BackendUnauthorized,
            ),
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
        for (body, said) in table {
            assert_eq!(remark(body.as_bytes()), said);
        }
    }
}
