//! Certificate authorities and the certificates they issue, made anew for every test.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use serde_json::Value;
use sysdig_metrics_adapter::tls::decode_base64;

use super::dir::replace;

const DAY: u64 = 86_400;
const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A certificate authority, a root or below one.
#[derive(Debug)]
pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Own certificate first; empty for a root, which its clients have already.
    chain: Vec<CertificateDer<'static>>,
}

impl Ca {
    pub fn new(cn: &str) -> Self {
        let issuer = CertifiedIssuer::self_signed(ca_params(cn), key()).expect("a root is self-signed");
        Self { issuer, chain: Vec::new() }
    }

    /// An authority below this one. Its leaves bring its certificate along.
    pub fn intermediate(&self, cn: &str) -> Self {
        let issuer = CertifiedIssuer::signed_by(ca_params(cn), key(), &self.issuer).expect("an intermediate is signed");
        let mut chain = vec![issuer.der().clone()];
        chain.extend_from_slice(&self.chain);
        Self { issuer, chain }
    }

    pub fn der(&self) -> &CertificateDer<'static> {
        self.issuer.der()
    }

    pub fn pem(&self) -> String {
        pem("CERTIFICATE", self.der())
    }

    /// A server certificate for names and IP addresses.
    pub fn issue_server(&self, sans: &[&str]) -> Leaf {
        let cn = sans.first().copied().unwrap_or("server");
        self.issue(LeafOptions { cn, sans, server: true, ..LeafOptions::default() })
    }

    pub fn issue_client(&self, cn: &str, orgs: &[&str]) -> Leaf {
        self.issue(LeafOptions { cn, orgs, client: true, ..LeafOptions::default() })
    }

    pub fn issue(&self, options: LeafOptions<'_>) -> Leaf {
        let key = key();
        let cert = options.params().signed_by(&key, &self.issuer).expect("a leaf is signed");
        Leaf { cert_der: cert.der().clone(), key_der: key.serialize_der(), chain_der: self.chain.clone() }
    }
}

/// What a leaf says; by default it is valid from yesterday for a year and good for neither side.
#[derive(Clone, Copy, Debug)]
pub struct LeafOptions<'a> {
    /// Empty: no common name at all.
    pub cn: &'a str,
    pub orgs: &'a [&'a str],
    /// DNS names and IP addresses.
    pub sans: &'a [&'a str],
    pub client: bool,
    pub server: bool,
    /// Days from now, negative in the past.
    pub not_before: i64,
    pub not_after: i64,
}

impl Default for LeafOptions<'_> {
    fn default() -> Self {
        Self { cn: "leaf", orgs: &[], sans: &[], client: false, server: false, not_before: -1, not_after: 365 }
    }
}

impl LeafOptions<'_> {
    fn params(&self) -> CertificateParams {
        let sans: Vec<String> = self.sans.iter().map(|&san| san.to_owned()).collect();
        let mut params = CertificateParams::new(sans).expect("alternative names are ASCII");
        params.distinguished_name = DistinguishedName::new();
        // rcgen keeps one value per attribute type, so of several organizations the last counts.
        for &org in self.orgs {
            params.distinguished_name.push(DnType::OrganizationName, org);
        }
        if !self.cn.is_empty() {
            params.distinguished_name.push(DnType::CommonName, self.cn);
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let usages = [(self.client, ExtendedKeyUsagePurpose::ClientAuth), (self.server, ExtendedKeyUsagePurpose::ServerAuth)];
        params.extended_key_usages = usages.into_iter().filter_map(|(wanted, usage)| wanted.then_some(usage)).collect();
        // The type of these fields belongs to a crate we do not name; it can be reached by adding to a date.
        params.not_before = date_time_ymd(1970, 1, 1) + days_from_now(self.not_before);
        params.not_after = date_time_ymd(1970, 1, 1) + days_from_now(self.not_after);
        params
    }
}

/// A certificate with its key and the intermediates that lead to a root.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub cert_der: CertificateDer<'static>,
    /// PKCS #8.
    pub key_der: Vec<u8>,
    pub chain_der: Vec<CertificateDer<'static>>,
}

impl Leaf {
    /// The leaf, then its intermediates.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(&self.cert_der).chain(&self.chain_der).cloned().collect()
    }

    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key_der.clone()).into()
    }

    /// The leaf, then its intermediates.
    pub fn cert_pem(&self) -> String {
        self.chain().iter().map(|der| pem("CERTIFICATE", der)).collect()
    }

    pub fn key_pem(&self) -> String {
        pem("PRIVATE KEY", &self.key_der)
    }

    /// Writes `tls.crt` and `tls.key`, named as in a Secret of type `kubernetes.io/tls`.
    pub fn write(&self, dir: &Path) -> (PathBuf, PathBuf) {
        (replace(&dir.join("tls.crt"), self.cert_pem()), replace(&dir.join("tls.key"), self.key_pem()))
    }
}

/// What the adapter keeps in its Secret, `data`, as if two thirds of the certificate's life were over, and with
/// `authority` two thirds of its authority's life too.
pub fn due(data: &Value, authority: bool) -> Value {
    let bytes = |name: &str| decode_base64(data[name].as_str().expect("the Secret is complete")).expect("base64");
    let key = |name: &str| PrivateKeyDer::from_pem_slice(&bytes(name)).expect("a key in PEM");
    let key = |name: &str| KeyPair::try_from(&key(name)).expect("a key of a known kind");
    let mut params = ca_params("sysdig-metrics-adapter-ca");
    params.not_before = date_time_ymd(1970, 1, 1) + days_from_now(-2640);
    params.not_after = date_time_ymd(1970, 1, 1) + days_from_now(1010);
    let issuer = CertifiedIssuer::self_signed(params, key("ca.key")).expect("a root is self-signed");
    let names = ["api.custom-metrics.svc", "api.custom-metrics.svc.cluster.local", "api.custom-metrics", "api", "localhost"];
    let leaf = LeafOptions { sans: &names, server: true, not_before: -61, not_after: 29, ..LeafOptions::default() };
    let leaf = leaf.params().signed_by(&key("tls.key"), &issuer).expect("a leaf is signed");
    let encoded = |der: &CertificateDer<'_>| Value::from(base64(pem("CERTIFICATE", der).as_bytes()));
    let mut due = data.clone();
    due["tls.crt"] = encoded(leaf.der());
    if authority {
        due["ca.crt"] = encoded(issuer.der());
    }
    due
}

/// A server that shows `leaf` and asks for no client certificate.
pub fn rustls_server_config(leaf: &Leaf) -> Arc<ServerConfig> {
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider knows the default versions")
        .with_no_client_auth()
        .with_single_cert(leaf.chain(), leaf.private_key())
        .expect("key and certificate belong together");
    Arc::new(config)
}

pub fn pem(label: &str, der: &[u8]) -> String {
    let encoded = base64(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in encoded.as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// RFC 4648, section 4, with padding.
pub fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let [a, b, c] = [0, 1, 2].map(|at| u32::from(group.get(at).copied().unwrap_or(0)));
        let bits = a << 16 | b << 8 | c;
        for (at, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let digit = char::from(BASE64[(bits >> shift & 63) as usize]);
            text.push(if at <= group.len() { digit } else { '=' });
        }
    }
    text
}

fn ca_params(cn: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, cn);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a P-256 key is generated")
}

/// Since the epoch.
fn days_from_now(days: i64) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    let offset = Duration::from_secs(days.unsigned_abs() * DAY);
    if days < 0 { now.saturating_sub(offset) } else { now + offset }
}
