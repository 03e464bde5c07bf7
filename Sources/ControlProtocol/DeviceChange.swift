/// A step by which the devices of a VM that runs have come to differ from its command line. Who has the command line and the
/// steps has the configuration.
package struct DeviceChange: Equatable, Sendable {
  package enum Step: Equatable, Sendable {
    /// With its id.
    case added(DeviceOrder)
    case removed
    /// By `martlet ctl replace`.
    case served(VMConfiguration.External)
    case image(Image)
  }

  /// What a disk of ours is after a replacement.
  package struct Image: Equatable, Sendable {
    package var path: String
    package var readOnly: Bool
    package var isShared: Bool
    package var serial: String?
    /// Of the block program.
    package var arguments: [String]

    package init(path: String, readOnly: Bool, isShared: Bool, serial: String?, arguments: [String]) {
      self.path = path
      self.readOnly = readOnly
      self.isShared = isShared
      self.serial = serial
      self.arguments = arguments
    }
  }

  package var id: String
  package var step: Step

  package init(id: String, step: Step) {
    self.id = id
    self.step = step
  }

  var isAddition: Bool { if case .added = step { true } else { false } }
}

extension VMConfiguration {
  /// Brings it to where `changes` led another one.
  package mutating func follow(_ changes: [DeviceChange]) throws(ConfigurationError) {
    for change in changes {
      switch change.step {
      case .added(let order):
        let after = try adding(order)
        guard after.id == change.id else { throw .unexpectedArgument(order.line) }
        self = after.configuration
      case .removed: self = removing(change.id)
      case .served(let external): serve(change.id, by: external)
      case .image(let image):
        guard var disk = disks.first(where: { $0.id == change.id }) else { throw .unexpectedArgument(change.id) }
        disk.source = .image(path: image.path, readOnly: image.readOnly)
        disk.isShared = image.isShared
        disk.serial = image.serial
        disk.backEndArguments = image.arguments
        serve(disk)
      }
    }
  }

  /// Somebody else serves the device from now on.
  package mutating func serve(_ id: String, by external: External) {
    let before = self
    for index in disks.indices where disks[index].id == id { disks[index].source = .external(external) }
    for index in nets.indices where nets[index].id == id { nets[index].source = .external(external) }
    for index in generics.indices where generics[index].id == id { generics[index].source = external }
    for index in fileSystems.indices where fileSystems[index].id == id { fileSystems[index].source = external }
    guard self != before else { return }
    // What an image before it left in the disk stays.
    changes.removeAll { if case .served = $0.step { $0.id == id } else { false } }
    changes.append(DeviceChange(id: id, step: .served(external)))
  }

  /// The disk of that id is this one from now on, with an image.
  package mutating func serve(_ disk: Disk) {
    guard let place = disks.firstIndex(where: { $0.id == disk.id }), disks[place] != disk,
      case .image(let path, let readOnly) = disk.source
    else { return }
    disks[place] = disk
    changes.removeAll { change in
      switch change.step {
      case .served, .image: change.id == disk.id
      case .added, .removed: false
      }
    }
    let image = DeviceChange.Image(
      path: path, readOnly: readOnly, isShared: disk.isShared, serial: disk.serial, arguments: disk.backEndArguments)
    changes.append(DeviceChange(id: disk.id, step: .image(image)))
  }
}
