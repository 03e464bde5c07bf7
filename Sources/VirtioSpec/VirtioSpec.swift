/// # VirtioSpec
///
/// The virtio specification (1.4) as Swift values: device ids, feature bits, status bits, ring layouts, PCI structures,
/// configuration spaces and request headers. Nothing here does anything: no I/O, no memory of a guest, no policy. Both
/// ends use it, the process that owns the virtual machine and the processes that serve its queues, so that each number
/// of the specification is written once.
///
/// ```swift
/// let offered: FeatureSet = [.version1, .eventIndex, .indirectDescriptors, .blockFlush]
/// let refused = accepted.subtracting(offered)
/// log("driver accepted \(refused.names(for: .block)) though never offered")
///
/// var configuration = BlockConfiguration()
/// configuration.capacity = 4096
/// let bytes = configuration.encoded()   // 96 bytes, little-endian
/// ```
///
/// Everything in virtio is little-endian, and so is the only machine this is built for; structures that a device copies
/// out of a request (`BlockRequestHeader`, `NetHeader`, ...) therefore have exactly the memory layout of the
/// specification and may be filled with one copy of `byteCount` bytes.
public enum VirtioSpec {
  /// The `VIRTIO_F_VERSION_1` dialect is the only one spoken; this is the revision of the text that was followed.
  public static let revision = "1.4"
}
