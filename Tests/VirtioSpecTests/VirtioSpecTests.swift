import Testing
import VirtioSpec

@Suite("Virtio specification")
struct VirtioSpecTests {
  @Test func structuresCopiedFromRequestsHaveTheLayoutOfTheSpecification() {
    #expect(MemoryLayout<BlockRequestHeader>.size == 16)
    #expect(MemoryLayout<BlockRequestHeader>.offset(of: \.sector) == 8)
    #expect(MemoryLayout<BlockRangeSegment>.size == 16)
    #expect(MemoryLayout<BlockRangeSegment>.offset(of: \.flags) == 12)
    #expect(MemoryLayout<NetHeader>.size == 12)
    #expect(MemoryLayout<NetHeader>.offset(of: \.headerLength) == 2)
    #expect(MemoryLayout<NetHeader>.offset(of: \.checksumStart) == 6)
    #expect(MemoryLayout<NetHeader>.offset(of: \.bufferCount) == 10)
    #expect(MemoryLayout<ConsoleControl>.size == 8)
    #expect(MemoryLayout<ConsoleControl>.offset(of: \.value) == 6)
  }

  @Test func blockConfigurationPutsEveryFieldWhereTheSpecificationSays() {
    var configuration = BlockConfiguration()
    configuration.capacity = 0x0102_0304_0506_0708
    configuration.segmentMax = 126
    configuration.blockSize = 512
    configuration.minimumIOSize = 0x1122
    configuration.writeback = 1
    configuration.queueCount = 4
    configuration.discardSectorAlignment = 8
    configuration.writeZeroesMayUnmap = 1
    configuration.zoneModel = 2
    let bytes = configuration.encoded()
    #expect(bytes.count == 96)
    #expect(bytes[0..<8] == [8, 7, 6, 5, 4, 3, 2, 1])
    #expect(bytes[12] == 126)
    #expect(bytes[20..<24] == [0, 2, 0, 0])
    #expect(bytes[26..<28] == [0x22, 0x11])
    #expect(bytes[32] == 1 && bytes[33] == 0 && bytes[34] == 4)
    #expect(bytes[44] == 8 && bytes[56] == 1 && bytes[92] == 2)
    #expect(BlockConfiguration(decoding: bytes) == configuration)
  }

  @Test func shorterConfigurationOfAPeerLeavesTheRestZero() {
    var configuration = BlockConfiguration()
    configuration.capacity = 77
    configuration.blockSize = 4096
    let decoded = BlockConfiguration(decoding: Array(configuration.encoded().prefix(22)))
    #expect(decoded.capacity == 77)
    #expect(decoded.blockSize == 4096)
    #expect(decoded.queueCount == 0)
    #expect(BlockConfiguration(decoding: []) == BlockConfiguration())
  }

  @Test func netAndConsoleConfigurationsRoundTrip() throws {
    var net = NetConfiguration()
    net.mac = try #require(MACAddress("52:54:00:12:34:ff"))
    net.status = NetSpec.linkUp
    net.mtu = 1500
    net.maxQueuePairs = 2
    let bytes = net.encoded()
    #expect(bytes.count == 28)
    #expect(bytes[0..<6] == [0x52, 0x54, 0, 0x12, 0x34, 0xFF])
    #expect(bytes[6] == 1 && bytes[8] == 2 && bytes[10] == 0xDC && bytes[11] == 5)
    #expect(NetConfiguration(decoding: bytes) == net)
    var console = ConsoleConfiguration()
    console.columns = 80
    console.rows = 25
    console.maxPortCount = 1
    #expect(console.encoded() == [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    #expect(ConsoleConfiguration(decoding: console.encoded()) == console)
  }

  @Test(arguments: ["", "52:54:00:12:34", "52:54:00:12:34:5g", "525400123456", "52:54:00:12:34:+5", "52:54:00:12:34:56:", "5:4:0:2:4:6"])
  func textThatIsNoMACAddressIsRefused(_ text: String) {
    #expect(MACAddress(text) == nil)
  }

  @Test func deviceNamesNumbersAndPCIIdentifiersAgree() {
    #expect(DeviceID(nameOrNumber: "blk") == .block)
    #expect(DeviceID(nameOrNumber: "fs") == .fileSystem)
    #expect(DeviceID(nameOrNumber: "26") == .fileSystem)
    #expect(DeviceID(nameOrNumber: "0x1a") == .fileSystem)
    #expect(DeviceID(nameOrNumber: "0") == nil)
    #expect(DeviceID(nameOrNumber: "64") == nil)
    #expect(DeviceID(nameOrNumber: "disk") == nil)
    #expect(DeviceID.block.pciDeviceID == 0x1042)
    #expect(DeviceID.fileSystem.pciDeviceID == 0x105A)
    for (id, name) in DeviceID.named {
      #expect(DeviceID(nameOrNumber: name) == id)
      #expect(DeviceID(nameOrNumber: String(id.rawValue)) == id)
    }
  }

  @Test func featureNamesDependOnTheDevice() {
    let bitFive = FeatureSet(bit: 5)
    #expect(bitFive.names(for: .block) == ["RO"])
    #expect(bitFive.names(for: .net) == ["MAC"])
    #expect(bitFive.names(for: nil) == ["bit 5"])
    let mixed: FeatureSet = [.version1, .eventIndex, .blockFlush]
    #expect(mixed.names(for: .block) == ["FLUSH", "EVENT_IDX", "VERSION_1"])
    #expect(mixed.rawValue == 1 << 32 | 1 << 29 | 1 << 9)
    #expect(FeatureSet.transportMask.contains([.notifyOnEmpty, .ringReset, .suspend]))
    #expect(FeatureSet.transportMask.isDisjoint(with: FeatureSet(rawValue: 1 << 41 | 1 << 23 | 1 << 42)))
  }

  @Test func featuresWithoutWhatTheyNeedAreNamed() {
    #expect(FeatureSet([.netGuestTSO4]).unmetDependencies(for: .net) == .netGuestTSO4)
    #expect(FeatureSet([.netGuestTSO4, .netGuestChecksum]).unmetDependencies(for: .net) == [])
    #expect(FeatureSet([.netHostECN, .netChecksum]).unmetDependencies(for: .net) == .netHostECN)
    #expect(FeatureSet([.netMultipleQueues]).unmetDependencies(for: .net) == .netMultipleQueues)
    #expect(FeatureSet([.packedRing]).unmetDependencies(for: .block) == .packedRing)
    #expect(FeatureSet([.packedRing, .version1]).unmetDependencies(for: .block) == [])
  }

  @Test func ringSizesIncludeTheEventFields() {
    #expect(SplitRing.availableRingByteCount(queueSize: 256) == 518)
    #expect(SplitRing.usedRingByteCount(queueSize: 256) == 2054)
    #expect(SplitRing.usedEventOffset(queueSize: 256) == 516)
    #expect(SplitRing.isValid(queueSize: 32768) && SplitRing.isValid(queueSize: 1))
    #expect(!SplitRing.isValid(queueSize: 0) && !SplitRing.isValid(queueSize: 3) && !SplitRing.isValid(queueSize: 65535))
    #expect(PackedRing.isValid(queueSize: 3) && !PackedRing.isValid(queueSize: 32769))
  }

  @Test func fileSystemTagsAndContextIdentifiersAreChecked() {
    #expect(FileSystemConfiguration(tag: "") == nil)
    #expect(FileSystemConfiguration(tag: String(repeating: "x", count: 37)) == nil)
    #expect(FileSystemConfiguration(tag: "a\0b") == nil)
    #expect(FileSystemConfiguration(tag: "shared", requestQueueCount: 0) == nil)
    let bytes = FileSystemConfiguration(tag: "shared", requestQueueCount: 2)?.encoded()
    #expect(bytes?.count == 40 && bytes?[5] == UInt8(ascii: "d") && bytes?[6] == 0 && bytes?[36] == 2)
    #expect(VsockConfiguration(guestContextID: 2) == nil)
    #expect(VsockConfiguration(guestContextID: 0xFFFF_FFFF) == nil)
    #expect(VsockConfiguration(guestContextID: 3)?.encoded() == [3, 0, 0, 0, 0, 0, 0, 0])
  }

  @Test func statusPrintsItsBits() {
    #expect(DeviceStatus(rawValue: 0x4F).description == "ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK|NEEDS_RESET")
    #expect(DeviceStatus().description == "RESET")
  }
}
