import HostSystem
import VirtioSpec

/// Which device a back end is. The protocol cannot be asked, so what it offers has to tell.
struct DeviceGuess: Sendable {
  let device: DeviceID?
  /// How it is known, for people.
  let reason: String

  /// `--type`, or the best guess.
  static func device(_ options: Options, _ offer: Offer) throws(ProbeError) -> DeviceGuess {
    if let text = options.text("type") {
      guard let device = DeviceID(nameOrNumber: text) else {
        throw .badOption(
          "type", why: "does not know '\(text)'; it knows \(DeviceID.named.map(\.name).joined(separator: ", "))")
      }
      return DeviceGuess(device: device, reason: "asked for")
    }
    return guess(offer)
  }

  static func guess(_ offer: Offer) -> DeviceGuess {
    let device = offer.features.subtracting(FeatureSet.transportMask).subtracting(.vhostOnlyMask)
    let bits = Set(device.bits)
    let hasMTU = offer.protocolFeatures.contains(.netMTU) || offer.protocolFeatures.contains(.rarp)
    if hasMTU { return DeviceGuess(device: .net, reason: "guessed: it offers protocol features of network cards") }
    if offer.protocolFeatures.contains(.cryptoSession), bits.isSubset(of: [0, 1, 2, 3, 4]) {
      return DeviceGuess(device: .crypto, reason: "guessed: it offers crypto sessions")
    }
    // Before disks: a console's emergency write has the bit of their SEG_MAX, but a disk then says how many, after byte 12.
    if let space = offer.configuration, space.count >= 12, !bits.isEmpty, bits.isSubset(of: [0, 1, 2]),
      space.dropFirst(12).allSatisfy({ $0 == 0 })
    {
      return DeviceGuess(device: .console, reason: "guessed: feature bits and a short configuration")
    }
    let blockBits: Set = [1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    if !bits.isEmpty, bits.isSubset(of: blockBits), bits.contains(9) || bits.contains(6) || bits.contains(2),
      let space = offer.configuration, space.count >= 60
    {
      let config = BlockConfiguration(decoding: space)
      let size = config.blockSize
      if !bits.contains(6) || (size >= 512 && size <= 65536 && size & (size - 1) == 0) {
        return DeviceGuess(device: .block, reason: "guessed: feature bits and a plausible block configuration")
      }
    }
    if bits.contains(15) || bits.contains(17) || bits.contains(0) && (bits.contains(11) || bits.contains(7)) {
      return DeviceGuess(device: .net, reason: "guessed: feature bits of network cards")
    }
    if let space = offer.configuration, space.count >= 40 {
      let tag = space.prefix(36).prefix { $0 != 0 }
      let padding = space.prefix(36).dropFirst(tag.count)
      if tag.count >= 1, tag.allSatisfy({ $0 >= 0x20 && $0 < 0x7F }), padding.allSatisfy({ $0 == 0 }), bits.subtracting([0]).isEmpty {
        return DeviceGuess(device: .fileSystem, reason: "guessed: the configuration begins with a tag")
      }
    }
    if bits.contains(9), bits.isSubset(of: blockBits) { return DeviceGuess(device: .block, reason: "guessed: feature bits of disks") }
    return DeviceGuess(device: nil, reason: "not recognised; say it with --type")
  }

  /// Refuses a back end that is recognised as something else than what is needed; `--type` overrules that.
  static func expect(_ wanted: DeviceID, _ offer: Offer, _ target: Target) throws(ProbeError) {
    let need = "needs a back end of type \(wanted.name ?? "\(wanted.rawValue)")"
    if let asked = target.askedType {
      guard asked == wanted else { throw .badOption("type", why: "says \(asked.name ?? "\(asked.rawValue)"), and this \(need)") }
      return
    }
    let found = guess(offer)
    guard let device = found.device, device != wanted else { return }
    throw .unsuitable(
      "The back end is of type \(device.name ?? "\(device.rawValue)") (\(found.reason)), and this \(need); --type overrules")
  }

  /// Queues the device has when nothing says so.
  static func defaultQueueCount(_ device: DeviceID?) -> Int {
    switch device {
    case .net?, .console?, .fileSystem?: 2
    case .vsock?: 3
    default: 1
    }
  }
}
