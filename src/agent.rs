//! The one place where an HTTP client is made: roots, deadlines, proxy.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Proxy};

use crate::tls::provider;

/// Whose certificates are trusted.
#[derive(Debug)]
pub enum Roots {
    /// Exactly these.
    Given(Vec<CertificateDer<'static>>),
    /// Mozilla's, as compiled in.
    Mozilla,
}

/// A client for one server. `timeout` covers a whole exchange, from name resolution to the last
/// byte of the body; redirects are answers like any other.
pub fn agent(roots: Roots, timeout: Duration, proxy: Option<Proxy>) -> Agent {
    let roots = match roots {
        Roots::Mozilla => RootCerts::WebPki,
        Roots::Given(list) => {
            RootCerts::new_with_certs(&list.iter().map(|der| Certificate::from_der(der).to_owned()).collect::<Vec<_>>())
        }
    };
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(roots)
        .unversioned_rustls_crypto_provider(provider())
        .build();
    Agent::config_builder()
        .tls_config(tls)
        .proxy(proxy)
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("sysdig-metrics-adapter/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

/// What went wrong below HTTP, in a few words and without any part of the request.
pub fn explain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "the host name is not known to DNS".to_owned(),
        ureq::Error::ConnectionFailed => "the connection is refused".to_owned(),
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Rustls(error) => format!("TLS: {error}"),
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::BodyExceedsLimit(limit) => format!("the answer is larger than {limit} bytes"),
        other => other.to_string(),
    }
}
