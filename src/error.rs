//! Every refusal the adapter can give, and the one place where it becomes a Kubernetes Status.
//! It is read in `kubectl describe hpa`, so its message names the thing and the mend; [`Reason::word`] is for scripts.

use crate::prelude::{JSON, Response, json, response};

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
    ($($code:literal $status:literal: $($variant:ident = $word:literal),+;)+) => {
        /// What kind of refusal, grouped by who must act.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason { $($(#[doc = concat!("`", $word, "`")] $variant,)+)+ }

        impl Reason {
            pub const ALL: &[Self] = &[$($(Self::$variant),+),+];

            /// HTTP status, Kubernetes reason, and the stable word for scripts, alerts and documentation.
            pub fn row(self) -> (u16, &'static str, &'static str) {
                match self { $($(Self::$variant => ($code, $status, $word),)+)+ }
            }
        }
    };
}

reasons! {
    // The caller.
    400 "BadRequest": InvalidRequest = "invalid-request";
    401 "Unauthorized": Unauthenticated = "unauthenticated";
    403 "Forbidden": Forbidden = "forbidden";
    404 "NotFound": NotFound = "not-found", ObjectNotFound = "object-not-found";
    405 "MethodNotAllowed": MethodNotAllowed = "method-not-allowed";
    406 "NotAcceptable": NotAcceptable = "not-acceptable";
    408 "Timeout": RequestTimeout = "request-timeout";
    431 "RequestHeaderFieldsTooLarge": HeadTooLarge = "head-too-large";
    505 "HTTPVersionNotSupported": HttpVersion = "http-version";
    // The metric, as it stands in Sysdig.
    404 "NotFound": NoData = "no-data", PartlySeen = "partly-seen", MetricNotCollected = "metric-not-collected";
    503 "ServiceUnavailable": TooOld = "too-old";
    422 "UnprocessableEntity": NotFinite = "not-finite", OutOfRange = "out-of-range", Ambiguous = "ambiguous";
    // The operator of the adapter.
    503 "ServiceUnavailable": NotConfigured = "not-configured", ForeignSlot = "foreign-apiservice",
        KubernetesForbidden = "kubernetes-forbidden",
        BackendUnauthorized = "backend-unauthorized", BackendForbidden = "backend-forbidden";
    404 "NotFound": BackendRejected = "backend-rejected";
    // Nobody, or whoever runs what failed.
    429 "TooManyRequests": Overloaded = "overloaded";
    503 "ServiceUnavailable": KubernetesConflict = "kubernetes-conflict", KubernetesUnavailable = "kubernetes-unavailable",
        BackendRateLimited = "backend-rate-limited", BackendError = "backend-error", BackendTimeout = "backend-timeout",
        BackendUnreachable = "backend-unreachable", BackendInvalidAnswer = "backend-invalid-answer";
    500 "InternalError": Internal = "internal";
}

impl Reason {
    pub fn word(self) -> &'static str {
        self.row().2
    }

    /// Whether the last good value stands in for it, until that is too old.
    pub(crate) fn is_passing(self) -> bool {
        !matches!(self, Self::ObjectNotFound | Self::NotFinite | Self::OutOfRange | Self::Ambiguous | Self::InvalidRequest)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.reason.word(), self.message)
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
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message,
            "reason": reason, "details": { "causes": [{ "reason": word }] }, "code": code,
        });
        if let Some(seconds) = self.retry_after {
            status["details"]["retryAfterSeconds"] = seconds.into();
        }
        response(code, JSON, status.to_string(), if code == 429 { &[("Retry-After", "1")] } else { &[] })
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
