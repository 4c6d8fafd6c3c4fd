//! TLS both ways: certificates, PEM in and out, and the one place where an HTTP client is made.

use crate::prelude::*;
use rustls::crypto::{self, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, danger::ClientCertVerifier};
use rustls::{DigitallySignedStruct as Signature, DistinguishedName, Error, ServerConfig, SignatureScheme, sign::CertifiedKey};
use rustls::{client::danger::HandshakeSignatureValid as Valid, server::danger::ClientCertVerified as Verified, version};
use ureq::{Agent, Proxy, http, tls::Certificate, tls::RootCerts, tls::TlsConfig, tls::TlsProvider};
use webpki::{EndEntityCert, KeyUsage};

const LARGEST_ANSWER: u64 = 8 * 1024 * 1024;

/// SHA-256, for what must not be kept or guessed.
pub fn sha256(text: &str) -> [u8; 32] {
    let hash = ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().map(|it| it.common.hash_provider.hash(text.as_bytes()));
    hash.and_then(|hash| hash.as_ref().try_into().ok()).unwrap_or_default()
}

/// The certificates in a PEM bundle. Errors: Says what is wrong with it; an empty bundle is wrong, too.
pub fn certificates(pem: impl AsRef<[u8]>) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_ref()).collect();
    let found = found.map_err(|error| format!("broken PEM: {error}"))?;
    let broken = found.iter().find_map(|certificate| EndEntityCert::try_from(certificate).err());
    broken.map_or(Ok(()), |error| Err(format!("a broken certificate: {error}")))?;
    if found.is_empty() { Err("no PEM certificate".to_owned()) } else { Ok(found) }
}

/// The leaf of `chain`, if one of `authorities` vouches for it and its use at `now` (Unix seconds). Errors: Why not.
pub(crate) fn verified<'a>(
    chain: &'a [CertificateDer<'a>], authorities: &[CertificateDer<'_>], usage: KeyUsage, now: u64,
) -> Result<EndEntityCert<'a>, webpki::Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(webpki::Error::BadDer)?;
    let anchors = authorities.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<Vec<_>, _>>()?;
    let (leaf, time) = (EndEntityCert::try_from(leaf)?, UnixTime::since_unix_epoch(Duration::from_secs(now)));
    leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, intermediates, time, usage, None, None)?;
    Ok(leaf)
}

/// DER as PEM, <https://www.rfc-editor.org/rfc/rfc7468>.
pub fn pem(label: &str, der: &[u8]) -> String {
    let lines: String = der.chunks(48).map(|line| base64(line) + "\n").collect();
    format!("-----BEGIN {label}-----\n{lines}-----END {label}-----\n")
}

/// <https://www.rfc-editor.org/rfc/rfc4648#section-4>
pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = bytes.as_ref().chunks(3).flat_map(|group| {
        let bits = group.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - group.len()));
        (0..4).map(move |at| ALPHABET.get(bits >> (18 - 6 * at) & 63).filter(|_| at <= group.len()))
    });
    digits.map(|digit| digit.map_or('=', |byte| char::from(*byte))).collect()
}

/// The bytes that [`base64`] was made of; None for what it never makes.
pub fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let wrapped = format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n");
    CertificateDer::from_pem_slice(wrapped.as_bytes()).ok().map(|bytes| bytes.to_vec())
}

#[derive(Debug, Default)]
pub struct Serving {
    pub key: Mutex<Option<Arc<CertifiedKey>>>,
    /// Whether it is one that can be served for long: from then on the adapter counts as ready.
    pub settled: AtomicBool,
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        lock(&self.key).clone()
    }
}

/// A certificate chain and its key out of PEM text. Errors: Says which of the two is wrong, and how.
pub fn certified_key(chain: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates(chain).map_err(|mistake| format!("the certificate file holds {mistake}"))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_ref()).map_err(|error| format!("the key file holds no PEM key: {error}"))?;
    let pair = CertifiedKey::from_der(chain, key, &ring::default_provider());
    pair.map(Arc::new).map_err(|error| format!("certificate and key do not fit: {error}"))
}

/// How the door shakes hands. Errors: The versions and the cryptography do not fit together.
pub fn server_config(serving: Arc<Serving>, tls13_only: bool) -> Result<Arc<ServerConfig>, Error> {
    let versions: &[_] = if tls13_only { &[&version::TLS13] } else { &[&version::TLS13, &version::TLS12] };
    let provider = ring::default_provider();
    let verifier = AnyClientCertificate(provider.signature_verification_algorithms);
    let builder = ServerConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(versions)?;
    let mut config = builder.with_client_cert_verifier(Arc::new(verifier)).with_cert_resolver(serving);
    // A resumed session would skip the client certificate; each connection proves itself.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A client for one server, which Mozilla's roots vouch for if none are given, or nobody without `verify`. `timeout`
/// covers a whole exchange, from name resolution to the last byte of the body; redirects are answers like any other.
pub fn agent(roots: Option<&[CertificateDer<'_>]>, verify: bool, timeout: Duration, proxy: Option<Proxy>) -> Agent {
    let roots = roots.map_or(RootCerts::WebPki, |list| list.iter().map(|der| Certificate::from_der(der).to_owned()).into());
    let tls = TlsConfig::builder().provider(TlsProvider::Rustls).root_certs(roots).disable_verification(!verify);
    let tls = tls.unversioned_rustls_crypto_provider(Arc::new(ring::default_provider())).build();
    let config = Agent::config_builder().tls_config(tls).proxy(proxy).timeout_global(Some(timeout)).http_status_as_error(false);
    config.max_redirects(0).user_agent(concat!("sysdig-metrics-adapter/", env!("CARGO_PKG_VERSION"))).build().new_agent()
}

/// One request with a bearer token; the types are that of the answer and of `body`. The body is bounded.
pub(crate) fn exchange(
    agent: &Agent, method: Method, url: &str, token: &Secret, [accept, kind]: [&str; 2], body: String,
) -> Result<http::Response<Result<Vec<u8>, ureq::Error>>, ureq::Error> {
    let request = http::Request::builder().method(method).uri(url).header("Accept", accept).header("Content-Type", kind);
    let request = request.header("Authorization", format!("Bearer {}", token.expose())).body(body)?;
    Ok(agent.run(request)?.map(|mut body| body.with_config().limit(LARGEST_ANSWER).read_to_vec()))
}

/// What went wrong below HTTP, in a few words and without any part of the request.
pub fn explain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::ConnectionFailed => "the connection is refused".to_owned(),
        ureq::Error::Rustls(error) => format!("TLS: {error}"),
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        other => other.to_string(),
    }
}

/// Asks for a client certificate and accepts any: each request is judged against the configuration of its moment.
#[derive(Debug)]
struct AnyClientCertificate(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AnyClientCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(&self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<Verified, Error> {
        Ok(Verified::assertion())
    }

    fn verify_tls12_signature(&self, message: &[u8], cert: &CertificateDer<'_>, by: &Signature) -> Result<Valid, Error> {
        crypto::verify_tls12_signature(message, cert, by, &self.0)
    }

    fn verify_tls13_signature(&self, message: &[u8], cert: &CertificateDer<'_>, by: &Signature) -> Result<Valid, Error> {
        crypto::verify_tls13_signature(message, cert, by, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_that_of_fips_180() {
        let hex: String = sha256("abc").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn pem_survives_the_way_out_and_in() {
        for length in [0, 1, 2, 3, 47, 48, 49, 500] {
            let der: Vec<u8> = (0..length).map(|n| (n * 7) as u8).collect();
            let text = pem("CERTIFICATE", &der);
            let back: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>().unwrap();
            assert_eq!(back.first().map(|c| c.to_vec()), Some(der.clone()), "{text}");
            assert_eq!(decode_base64(&base64(&der)), Some(der));
        }
    }

    #[test]
    fn a_key_must_fit_its_certificate() {
        let make = || rcgen::generate_simple_self_signed(["api.custom-metrics.svc".to_owned()]).unwrap();
        let (one, two) = (make(), make());
        let cert = pem("CERTIFICATE", one.cert.der());
        let key = |made: &rcgen::CertifiedKey<rcgen::KeyPair>| pem("PRIVATE KEY", &made.signing_key.serialize_der());
        assert!(certified_key(cert.as_bytes(), key(&one).as_bytes()).is_ok());
        for (chain, key, named) in [
            (cert.as_str(), key(&two), "do not fit"),
            (cert.as_str(), String::new(), "no PEM key"),
            ("", key(&one), "no PEM certificate"),
            ("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", key(&one), "broken"),
        ] {
            let mistake = certified_key(chain.as_bytes(), key.as_bytes()).map(|_| ()).unwrap_err();
            assert!(mistake.contains(named), "{mistake}");
        }
    }

    #[test]
    fn a_serving_certificate_can_be_replaced() {
        let serving = Serving::default();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = pem("PRIVATE KEY", &made.signing_key.serialize_der());
        *lock(&serving.key) = certified_key(pem("CERTIFICATE", made.cert.der()).as_bytes(), key.as_bytes()).ok();
        assert!(!serving.settled.load(Relaxed), "whoever looks after it says when it is");
        assert!(server_config(Arc::new(serving), true).is_ok());
    }
}
