import VhostUser
import VirtioSpec

/// What one front end would make of a back end, by what it insists on.
struct FrontEndJudgement: Sendable {
  let frontEnd: String
  var works = true
  var remarks: [String] = []

  mutating func needs(_ condition: Bool, _ sentence: String) {
    guard !condition else { return }
    works = false
    remarks.append(sentence)
  }

  mutating func wishes(_ condition: Bool, _ sentence: String) {
    if !condition { remarks.append(sentence) }
  }
}

/// Rules of the front ends as their sources have them: our own, QEMU's (7.2 to 10.2), Cloud Hypervisor's (53).
extension InfoCard {
  var judgements: [FrontEndJudgement] { [martlet, qemu, cloudHypervisor] }

  private var martlet: FrontEndJudgement {
    var judgement = FrontEndJudgement(frontEnd: "Martlet")
    judgement.needs(offer.features.contains(.version1), "needs VERSION_1: there are no legacy devices")
    let protocolFeatures = offer.protocolFeatures
    speaksForItself(&judgement)
    needsConfiguration(&judgement, of: Self.configured)
    judgement.needs(!inflightFails, "needs the inflight area that is offered")
    judgement.needs(guess.device != .fileSystem || (offer.queueCount ?? 2) >= 2, "needs 2 queues from GET_QUEUE_NUM")
    judgement.wishes(protocolFeatures.contains(.replyAck), "no REPLY_ACK: set-up errors show late")
    judgement.wishes(
      protocolFeatures.contains(.inflightShmFD) || guess.device != .block,
      "no INFLIGHT_SHMFD: requests in flight are lost with the back end")
    judgement.wishes(protocolFeatures.contains(.resetDevice), "no RESET_DEVICE: a guest's reset only stops the rings")
    return judgement
  }

  private var qemu: FrontEndJudgement {
    let protocolFeatures = offer.protocolFeatures
    var judgement = FrontEndJudgement(frontEnd: "QEMU")
    if let device = guess.device {
      // These can be of the older kind, for drivers of before virtio 1.
      if [.net, .block, .scsi].contains(device) {
        judgement.wishes(offer.features.contains(.version1), "no VERSION_1: for drivers of legacy devices only (disable-legacy=off)")
      } else {
        judgement.needs(offer.features.contains(.version1), "needs VERSION_1")
      }
      judgement.wishes(
        Self.devicesOfQEMU.contains(device),
        "no device of its own for this type: vhost-user-test-device (QEMU 10.2 on) with virtio-id=\(device.rawValue)")
      judgement.needs(device != .crypto || protocolFeatures.contains(.cryptoSession), "needs CRYPTO_SESSION")
      needsConfiguration(&judgement, of: Self.configured.subtracting([.scsi, .crypto]))
      judgement.needs(!inflightFails || ![.block, .scsi].contains(device), "needs the inflight area that is offered")
    }
    judgement.needs(
      !offer.features.contains(.accessPlatform) || protocolFeatures.isSuperset(of: [.backEndRequests, .replyAck]),
      "needs BACKEND_REQ and REPLY_ACK with ACCESS_PLATFORM")
    switch guess.device {
    case .block?:
      judgement.wishes((offer.queueCount ?? 1) > 1, "one queue only: with more processors than one, say num-queues=1")
      judgement.wishes(protocolFeatures.contains(.inflightShmFD), "no INFLIGHT_SHMFD: a reconnect may lose requests")
    case .net?: judgement.wishes((offer.queueCount ?? 1) > 1, "one pair of queues only")
    default: break
    }
    if let device = guess.device, [.net, .block, .scsi, .fileSystem].contains(device) {
      judgement.wishes(
        protocolFeatures.contains(.logShmFD) && offer.features.contains(.vhostLogAll), "no LOG_SHMFD with LOG_ALL: no live migration")
      judgement.wishes(device != .fileSystem || protocolFeatures.contains(.deviceState), "no DEVICE_STATE: no migration")
    }
    judgement.wishes(
      protocolFeatures.contains(.configureMemSlots), "no CONFIGURE_MEM_SLOTS: at most 8 memory regions, so little memory hotplug")
    return judgement
  }

  private var cloudHypervisor: FrontEndJudgement {
    let protocolFeatures = offer.protocolFeatures
    var judgement = FrontEndJudgement(frontEnd: "Cloud Hypervisor")
    judgement.needs(offer.features.contains(.vhostUserProtocolFeatures), "needs PROTOCOL_FEATURES")
    judgement.needs(offer.features.contains(.version1), "needs VERSION_1")
    speaksForItself(&judgement)
    needsConfiguration(&judgement, of: Self.configured)
    judgement.needs(
      guess.device != .net || !protocolFeatures.contains(.config) || offer.configuration != nil,
      "needs the configuration space of a card that offers CONFIG")
    judgement.needs(!inflightFails, "needs the inflight area that is offered")
    if let device = guess.device {
      // Queues, also of a card: a back end that counts pairs and has one is refused.
      let least: UInt64 = [.net, .fileSystem].contains(device) ? 2 : 1
      judgement.needs((offer.queueCount ?? least) >= least, "needs \(least) queues, not pairs, from GET_QUEUE_NUM")
      if device == .block { judgement.wishes((offer.queueCount ?? 1) > 1, "one queue only") }
      if device == .net { judgement.wishes((offer.queueCount ?? 2) > 3, "one pair of queues only") }
      judgement.wishes(
        [.net, .block, .fileSystem].contains(device),
        "no option of its own for this type: --generic-vhost-user (version 52 on) with device_type=\(device.rawValue)")
    }
    judgement.wishes(
      guess.device != .block || protocolFeatures.contains(.inflightShmFD),
      "no INFLIGHT_SHMFD: a reconnect loses requests" + (offer.features.contains(.inOrder) ? " of drivers without IN_ORDER" : ""))
    judgement.wishes(
      protocolFeatures.contains(.logShmFD) && offer.features.contains(.vhostLogAll), "no LOG_SHMFD with LOG_ALL: no live migration")
    judgement.wishes(protocolFeatures.contains(.deviceState), "no DEVICE_STATE: its state is not in a snapshot")
    judgement.wishes(
      protocolFeatures.contains(.configureMemSlots), "no CONFIGURE_MEM_SLOTS: memory that is added means the whole table again")
    judgement.wishes(protocolFeatures.contains(.replyAck), "no REPLY_ACK: it waits for nothing")
    return judgement
  }

  // MARK: What they have in common

  /// Devices whose drivers find something in the configuration space without which they do not work. Those of cards and file systems
  /// are made up by every front end itself.
  private static let configured: Set<DeviceID> = [
    .block, .scsi, .balloon, .plan9, .gpu, .input, .vsock, .crypto, .iommu, .memory, .sound, .persistentMemory, .gpio,
  ]

  /// Types QEMU has a vhost-user device for, cryptodev-vhost-user among them.
  private static let devicesOfQEMU: Set<DeviceID> = [
    .net, .block, .scsi, .fileSystem, .gpu, .input, .vsock, .crypto, .sound, .i2c, .gpio, .entropy,
  ]

  /// What of a device only QEMU's front end does itself.
  private func speaksForItself(_ judgement: inout FrontEndJudgement) {
    judgement.needs(guess.device != .gpu, "never sends the GPU_SET_SOCKET that a gpu needs")
    judgement.needs(
      guess.device != .crypto || !offer.protocolFeatures.contains(.cryptoSession), "never sends CREATE_CRYPTO_SESSION, which is offered")
  }

  private func needsConfiguration(_ judgement: inout FrontEndJudgement, of devices: Set<DeviceID>) {
    guard let device = guess.device, devices.contains(device) else { return }
    let name = device.name ?? "device"
    guard offer.protocolFeatures.contains(.config) else { return judgement.needs(false, "needs CONFIG for a \(name)") }
    // A front end asks for the whole structure of a disk at once, and for nothing less when that is refused.
    let least = device == .block ? BlockConfiguration.commonByteCount : 1
    judgement.needs(
      offer.configuration.map { $0.count >= least } == true,
      device == .block ? "needs \(least) bytes of the configuration space of a disk" : "needs the configuration space of a \(name)")
  }
}
