//! Every refusal the adapter can give, and the one place where it becomes a Kubernetes Status.
//! It is read in `kubectl describe hpa`, so its message names the thing and the mend; [`Reason::word`] is for scripts.

use crate::api::{JSON, Response, response};
use serde_json::json;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub reason: Reason,
    /// Names the thing and the mend; never holds a secret.
    pub message: String,
    /// Seconds after which asking again makes sense, where that is known.
    pub retry_after: Option<u64>,
}

/// `refusal!(NoData, "no sample of {metric}")`: an [`Error`] with a formatted message.
macro_rules! refusal {
    ($reason:ident, $($message:tt)+) => { $crate::error::Error::new($crate::error::Reason::$reason, format!($($message)+)) };
}

/// `ensure!(fits, InvalidRequest, "{text} is too long")`: returns the refusal unless it `fits`.
macro_rules! ensure {
    ($fits:expr, $($refusal:tt)+) => { if !$fits { return Err($crate::error::refusal!($($refusal)+)); } };
}
pub(crate) use {ensure, refusal};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal $status:literal $word:literal,)+) => {
        /// What kind of refusal, grouped by who must act.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason { $(#[doc = concat!("`", $word, "`")] $(#[$doc])* $variant,)+ }

        impl Reason {
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// HTTP status, Kubernetes reason, and the stable word for scripts, alerts and documentation.
            fn row(self) -> (u16, &'static str, &'static str) {
                match self { $(Self::$variant => ($code, $status, $word),)+ }
            }
        }
    };
}

reasons! {
    // The caller.
    InvalidRequest = 400 "BadRequest" "invalid-request",
    Unauthenticated = 401 "Unauthorized" "unauthenticated",
    Forbidden = 403 "Forbidden" "forbidden",
    NotFound = 404 "NotFound" "not-found",
    MethodNotAllowed = 405 "MethodNotAllowed" "method-not-allowed",
    NotAcceptable = 406 "NotAcceptable" "not-acceptable",
    RequestTimeout = 408 "Timeout" "request-timeout",
    HeadTooLarge = 431 "RequestHeaderFieldsTooLarge" "head-too-large",
    HttpVersion = 505 "HTTPVersionNotSupported" "http-version",
    ObjectNotFound = 404 "NotFound" "object-not-found",
    // The metric, as it stands in Sysdig.
    NoData = 404 "NotFound" "no-data",
    PartlySeen = 404 "NotFound" "partly-seen",
    MetricNotCollected = 404 "NotFound" "metric-not-collected",
    TooOld = 503 "ServiceUnavailable" "too-old",
    NotFinite = 422 "UnprocessableEntity" "not-finite",
    OutOfRange = 422 "UnprocessableEntity" "out-of-range",
    Ambiguous = 422 "UnprocessableEntity" "ambiguous",
    // The operator of the adapter.
    NotConfigured = 503 "ServiceUnavailable" "not-configured",
    ForeignSlot = 503 "ServiceUnavailable" "foreign-apiservice",
    KubernetesForbidden = 503 "ServiceUnavailable" "kubernetes-forbidden",
    BackendUnauthorized = 503 "ServiceUnavailable" "backend-unauthorized",
    BackendForbidden = 503 "ServiceUnavailable" "backend-forbidden",
    BackendRejected = 404 "NotFound" "backend-rejected",
    // Nobody, or whoever runs what failed.
    Overloaded = 429 "TooManyRequests" "overloaded",
    KubernetesConflict = 503 "ServiceUnavailable" "kubernetes-conflict",
    KubernetesUnavailable = 503 "ServiceUnavailable" "kubernetes-unavailable",
    BackendRateLimited = 503 "ServiceUnavailable" "backend-rate-limited",
    BackendError = 503 "ServiceUnavailable" "backend-error",
    BackendTimeout = 503 "ServiceUnavailable" "backend-timeout",
    BackendUnreachable = 503 "ServiceUnavailable" "backend-unreachable",
    BackendInvalidAnswer = 503 "ServiceUnavailable" "backend-invalid-answer",
    Internal = 500 "InternalError" "internal",
}

impl Reason {
    pub fn word(self) -> &'static str {
        self.row().2
    }

    /// Whether the last good value stands in for it, until that is too old.
    pub(crate) fn is_passing(self) -> bool {
        let lasting = [Self::ObjectNotFound, Self::NotFinite, Self::OutOfRange, Self::Ambiguous, Self::InvalidRequest];
        !lasting.contains(&self)
    }

    /// Whether it says something about Sysdig as a whole.
    pub(crate) fn is_everybodys(self) -> bool {
        self.word().starts_with("backend-") && self != Self::BackendRejected
    }
}

impl Error {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), retry_after: None }
    }

    /// The refusal as a Kubernetes Status; the reason word stands in `details.causes`. Only 429 carries `Retry-After`:
    /// Kubernetes' client sleeps and retries up to ten times on any 5xx that has one, which would hold one of the few HPA workers
    /// for all that time. Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/>.
    pub(crate) fn response(&self) -> Response {
        let (code, reason, word) = self.reason.row();
        let mut details = json!({ "causes": [{ "reason": word }] });
        if let Some(seconds) = self.retry_after {
            details["retryAfterSeconds"] = seconds.into();
        }
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message,
            "reason": reason, "details": details, "code": code,
        });
        let seconds = self.retry_after.unwrap_or(1).to_string();
        let headers = [("Retry-After", seconds.as_str())];
        response(code, JSON, status.to_string(), if self.reason == Reason::Overloaded { &headers } else { &[] })
    }
}

/// Text from outside, made safe to repeat: one line, bounded, without control characters.
pub fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(200).collect();
    let cut = if shown.len() < text.len() { "…" } else { "" };
    format!("{:?}", shown + cut)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_becomes_a_status_with_its_own_word() {
        let mut words = BTreeSet::new();
        for &reason in Reason::ALL {
            let response = Error { retry_after: Some(7), ..Error::new(reason, "say what to do") }.response();
            let (code, headers) = (response.status_code().0, response.headers().to_vec());
            let status: serde_json::Value = serde_json::from_reader(response.into_reader()).unwrap();
            assert_eq!(status["kind"], "Status", "{reason:?}");
            assert_eq!(status["message"], "say what to do");
            assert_eq!(status["code"], code);
            assert!(code >= 400);
            assert_eq!(status["details"]["causes"][0]["reason"], reason.word());
            assert_eq!(status["details"]["retryAfterSeconds"], 7);
            assert_eq!(headers.iter().any(|it| it.field.equiv("Retry-After")), code == 429);
            assert!(words.insert(reason.word()), "{reason:?} shares its word");
        }
        assert_eq!(words.len(), Reason::ALL.len());
    }

    #[test]
    fn text_from_outside_is_bounded_and_on_one_line() {
        assert_eq!(quoted("a\nb\u{1b}[31m"), r#""a\nb\u{1b}[31m""#);
        assert_eq!(quoted(&"é".repeat(10_000)).chars().count(), 203);
    }
}
