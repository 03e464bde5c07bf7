import ControlProtocol
import VhostUser
import VirtioSpec

/// Whether another back end could do for a running guest what the present one does: one finding for each thing that matters.
/// Nothing is changed by looking.
package struct ReplacementCheck {
  package typealias Finding = CoreMessage.Finding

  let device: DeviceID
  /// What the driver has agreed to and back ends have to carry; empty without a driver.
  let agreed: FeatureSet
  /// What the guest was offered of it.
  let shown: FeatureSet
  /// What it is never shown.
  let hidden: FeatureSet
  /// The configuration space as the guest reads it.
  let space: [UInt8]
  /// The core answers for the configuration space itself.
  let servesSpace: Bool
  let queueCount: Int
  let regionCount: Int
  let old: Offer?

  func findings(_ new: Offer) -> [Finding] {
    [type(new), features(new), readOnly(new), protocolFeatures(new), queues(new), memory(new)].compactMap { $0 }
      + configuration(new) + [inflight(new)]
  }

  /// The protocol does not say which device it is; what it offers does, as far as another kind of device would offer other things.
  private func type(_ new: Offer) -> Finding? {
    let own = new.features.subtracting(.transportMask).subtracting(.vhostOnlyMask)
    let foreign = own.subtracting(own.known(for: device))
    guard foreign.isEmpty else {
      return Finding(
        .refusal, "device type", "it offers feature bits \(foreign.bits), which no device of type \(device) has; is it one?")
    }
    return Finding(.fine, "device type", "\(device), as far as its features tell")
  }

  private func features(_ new: Offer) -> Finding? {
    let missing = agreed.subtracting(new.features).subtracting(informative)
    guard missing.isEmpty else {
      return Finding(
        .refusal, "features", "the guest has agreed to \(list(missing)), which it does not offer")
    }
    let lost = shown.subtracting(new.features)
    let gained = new.features.subtracting(shown).subtracting(hidden)
    guard !lost.isEmpty || !gained.isEmpty else { return Finding(.fine, "features", "the same") }
    var parts: [String] = []
    if !lost.isEmpty { parts.append("without \(list(lost))") }
    if !gained.isEmpty { parts.append("with \(list(gained))") }
    return Finding(.note, "features", "\(parts.joined(separator: ", ")) from the driver's next start on")
  }

  /// Features that only announce something: without them, nothing the driver does goes wrong. `SIZE_MAX` is a limit that it
  /// goes on to keep.
  private var informative: FeatureSet { device == .block ? [.blockSizeMax, .blockGeometry, .blockTopology] : [] }

  private func readOnly(_ new: Offer) -> Finding? {
    guard device == .block, new.features.contains(.blockReadOnly), !agreed.isEmpty, !agreed.contains(.blockReadOnly) else { return nil }
    return Finding(.refusal, "read-only", "it can only be read, and the guest's driver writes")
  }

  private func protocolFeatures(_ new: Offer) -> Finding? {
    if old?.protocolFeatures.contains(.config) == true, !servesSpace, !new.protocolFeatures.contains(.config) {
      return Finding(.refusal, "protocol features", "it has no CONFIG, and the guest reads the device's configuration space")
    }
    let lost = (old?.protocolFeatures ?? []).subtracting(new.protocolFeatures).subtracting(.inflightShmFD)
    guard !lost.isEmpty else { return Finding(.fine, "protocol features", list(new.protocolFeatures.featureNames)) }
    return Finding(.note, "protocol features", "\(list(new.protocolFeatures.featureNames)); without \(list(lost.featureNames))")
  }

  /// Network back ends may count pairs of queues.
  private func queues(_ new: Offer) -> Finding? {
    guard let said = new.queueCount else {
      let usual = device == .net || device == .console || device == .fileSystem ? 2 : 1
      guard queueCount <= usual else {
        return Finding(.refusal, "queues", "it does not say how many it has (no MQ), and the device has \(queueCount)")
      }
      return Finding(.fine, "queues", "\(queueCount), without MQ")
    }
    let count = device == .net ? said * 2 : said
    guard count >= queueCount else { return Finding(.refusal, "queues", "it has \(said), and the device has \(queueCount)") }
    return Finding(.fine, "queues", "\(said), of which \(queueCount) are used")
  }

  private func memory(_ new: Offer) -> Finding? {
    guard regionCount > RegionTable.baselineCount else { return nil }
    guard let slots = new.maximumMemorySlots, slots >= regionCount else {
      return Finding(
        .refusal, "memory",
        "the guest has \(regionCount) memory regions, and it takes \(new.maximumMemorySlots ?? RegionTable.baselineCount)")
    }
    return nil
  }

  private func inflight(_ new: Offer) -> Finding {
    if new.protocolFeatures.contains(.inflightShmFD) { return Finding(.fine, "requests in flight", "recorded") }
    let consequence =
      agreed.contains(.packedRing)
      ? "if it dies, the device needs a reset" : "if it dies, requests that were completed out of order are done again"
    return Finding(.note, "requests in flight", "not recorded: \(consequence)")
  }

  // MARK: Configuration space

  private func configuration(_ new: Offer) -> [Finding] {
    guard !servesSpace, !space.isEmpty, let bytes = new.configuration else { return [] }
    switch device {
    case .block: return block(BlockConfiguration(decoding: space), BlockConfiguration(decoding: bytes), new.features)
    // Sizes of the terminal change at any time.
    case .console: return []
    default:
      let count = min(space.count, bytes.count)
      guard space[..<count] == bytes[..<count] else {
        return [Finding(.refusal, "configuration", "its configuration space says something else than the guest has read")]
      }
      return [Finding(.fine, "configuration", "the same")]
    }
  }

  private func block(_ old: BlockConfiguration, _ new: BlockConfiguration, _ offered: FeatureSet) -> [Finding] {
    var findings: [Finding] = []
    if new.capacity < old.capacity {
      findings.append(
        Finding(.refusal, "capacity", "it has \(new.capacity) sectors of 512 bytes, and the guest has a disk of \(old.capacity)"))
    } else if new.capacity > old.capacity {
      findings.append(Finding(.note, "capacity", "the disk grows from \(old.capacity) to \(new.capacity) sectors of 512 bytes"))
    } else {
      findings.append(Finding(.fine, "capacity", "\(new.capacity) sectors of 512 bytes"))
    }
    guard !agreed.isEmpty else { return findings }
    if agreed.contains(.blockBlockSize), new.blockSize != old.blockSize {
      findings.append(Finding(.refusal, "block size", "it has blocks of \(new.blockSize) bytes, and the guest's are of \(old.blockSize)"))
    }
    // Zero: none.
    if agreed.contains(.blockSizeMax), offered.contains(.blockSizeMax), new.sizeMax != 0, old.sizeMax == 0 || new.sizeMax < old.sizeMax {
      findings.append(Finding(.refusal, "segment size", "it takes at most \(new.sizeMax) bytes, and the guest was told \(old.sizeMax)"))
    }
    let limits: [(FeatureSet, String, UInt32, UInt32)] = [
      (.blockSegMax, "segments", old.segmentMax, new.segmentMax),
      (.blockDiscard, "discard sectors", old.maxDiscardSectors, new.maxDiscardSectors),
      (.blockDiscard, "discard segments", old.maxDiscardSegments, new.maxDiscardSegments),
      (.blockWriteZeroes, "write-zeroes sectors", old.maxWriteZeroesSectors, new.maxWriteZeroesSectors),
      (.blockWriteZeroes, "write-zeroes segments", old.maxWriteZeroesSegments, new.maxWriteZeroesSegments),
    ]
    for (feature, subject, before, after) in limits
    where agreed.contains(feature) && after < before {
      findings.append(Finding(.refusal, subject, "it takes at most \(after), and the guest was told \(before)"))
    }
    return findings
  }

  private func list(_ features: FeatureSet) -> String { list(features.names(for: device)) }
  private func list(_ names: [String]) -> String { names.isEmpty ? "none" : names.joined(separator: " ") }
}

extension FeatureSet {
  /// Those of the bits that the specification gives to `device`.
  fileprivate func known(for device: DeviceID) -> FeatureSet {
    FeatureSet.legacy(device).union(
      bits.reduce(into: FeatureSet()) { result, bit in
        if FeatureSet.hasName(bit: bit, device) { result.formUnion(FeatureSet(bit: bit)) }
      })
  }

  /// Bits of former versions that back ends still offer and modern drivers leave alone.
  private static func legacy(_ device: DeviceID) -> FeatureSet {
    switch device {
    // VIRTIO_BLK_F_BARRIER, _SCSI
    case .block: FeatureSet(bit: 0).union(FeatureSet(bit: 7))
    // VIRTIO_NET_F_GSO
    case .net: FeatureSet(bit: 6)
    default: []
    }
  }
}
